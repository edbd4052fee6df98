"""Results in an S3 bucket, which machines share that have no file system in common: Snakemake's storage plugin, whole folders.

    moepress quantization=gptq hydra.launcher.storage=s3://BUCKET/PREFIX

Snakemake fetches what a job reads and the bucket has, and stores what a job made. Its local copies are the folders of results
themselves, so all else (locks, hashes, partial folders, the commands that read results) is as without a bucket. A bucket has
neither renames nor locks: a folder is whole there when every file that its provenance.json names is there with its size;
and two machines that come to the same artefact at the same moment both make it.
"""

import json
import shutil
from pathlib import Path

from moepress import integrity, locks


def apply(workflow, results: str) -> None:
    """Nothing where Snakemake was given no default storage. ValueError for one that is not S3, or for no name in a bucket."""
    settings = workflow.storage_settings
    provider = workflow.storage_registry.default_storage_provider if settings.default_storage_provider else None
    if provider is None:
        return
    if settings.default_storage_provider != "s3":
        raise ValueError(f"--default-storage-provider {settings.default_storage_provider}: only s3 keeps folders whole here")
    if ".." in Path(results).parts:
        raise ValueError(f"paths.results={results}: in a bucket it has the same name, which cannot go up; leave out the '..'")
    from snakemake.dag import DAG  # by the time that Snakemake has read a Snakefile: it cannot be imported first

    place = provider.object(f"{(settings.default_storage_prefix or '').rstrip('/')}/{results}")
    _link(place.local_path(), Path(results))
    _keep_whole(type(place))
    DAG.sanitize_local_storage_copies = _remove_nothing


def _link(copies: Path, results: Path) -> None:
    """Let the local copies be the results."""
    results.mkdir(parents=True, exist_ok=True)
    copies.parent.mkdir(parents=True, exist_ok=True)
    if copies.is_symlink() and not copies.exists():  # the checkout has moved
        copies.unlink(missing_ok=True)
    if not copies.exists():
        copies.symlink_to(results.absolute())


async def _remove_nothing(dag) -> None:
    """Instead of all local copies that the bucket lacks: they are the results."""


def _keep_whole(cls) -> None:
    """Let the plugin's class for a file or folder in a bucket have artefacts there and here, whole or not at all."""
    if hasattr(cls, "is_whole"):
        return
    exists, store, retrieve = cls.exists, cls.store_object, cls.retrieve_object

    def is_whole(self) -> bool:
        """Whether a folder in the bucket has all the files of its provenance."""
        sizes = {item.key.removeprefix(f"{self.key}/"): item.size for item in self.get_subkeys()}
        if integrity.PROVENANCE not in sizes:
            return False
        told = json.loads(self.s3obj(integrity.PROVENANCE).get()["Body"].read())["files"]
        return all(sizes.get(name) == entry["bytes"] for name, entry in told.items())

    def exists_whole(self) -> bool:
        self._is_dir = None  # since it was asked last, a pod may have stored the folder
        return self.is_whole() if self.is_dir() else exists(self)

    def store_whole(self) -> None:
        if not (self.local_path().is_dir() and self.is_whole()):  # else another machine was faster
            store(self)

    def retrieve_whole(self) -> None:
        """Under another name until all of it is here."""
        target = self.local_path()
        if not self.is_dir():
            retrieve(self)
        elif not integrity.is_whole(target):  # looked at without the lock, which whoever reads it shares
            with locks.hold(locks.of(target), f"makes or fetches {target}; waiting for it"):
                if not integrity.is_whole(target):
                    fetch(self, target)

    def fetch(self, target: Path) -> None:
        beside = target.with_name(f".{target.name}.fetched")
        shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
        self.set_local_path(beside)
        try:
            retrieve(self)
        finally:
            self.set_local_path(None)
        beside.rename(target)

    cls.is_whole, cls.exists, cls.store_object, cls.retrieve_object = is_whole, exists_whole, store_whole, retrieve_whole
