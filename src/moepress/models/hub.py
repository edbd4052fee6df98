"""Models of the Hugging Face hub, into the hub's own cache: whole ones, and the files that tell their sizes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moepress.models.files import INDEX, Entry


def download(model_id: str, revision: str) -> Path:
    """The folder of a hub model: configuration, tokenizer and safetensors only, never pickles, and no folder in it: those hold
    other forms of the same weights. Raises ValueError for a model that cannot be had."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]  # that one for its licence
    with _errors_named(model_id, revision):
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))


def fetch_sizes(model_id: str, revision: str, local: bool = False) -> tuple[Path, dict[str, Entry]]:
    """`(folder, tensors)` that tell the sizes of a hub model without its weights. The folder has config.json and the index, and
    tensors is empty; for a model without an index, whose weights are a lone file, tensors are that file's, by their stored
    names. local: look only at files that are here already.

    Raises ValueError for a model that cannot be had.
    """
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with _errors_named(model_id, revision, ": config.json"):
        folder = Path(hf_hub_download(model_id, "config.json", revision=revision, local_files_only=local)).parent
    if list(folder.glob("*.safetensors")):
        return folder, {}
    with _errors_named(model_id, revision, f": {INDEX}"):
        try:
            hf_hub_download(model_id, INDEX, revision=revision, local_files_only=local)
            return folder, {}
        except RemoteEntryNotFoundError:
            files = get_safetensors_metadata(model_id, revision=revision).files_metadata.values()
    return folder, {n: Entry(None, n, t.dtype, tuple(t.shape)) for file in files for n, t in file.tensors.items()}


@contextmanager
def _errors_named(model_id: str, revision: str, what: str = "") -> Iterator[None]:
    """The hub's errors as ValueErrors that name the configuration's keys and say what to do."""
    from huggingface_hub.errors import HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        yield
    except (OSError, HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError) as error:
        # hub and connection errors are OSErrors
        raise ValueError(
            f"model.id={model_id!r} (model.revision={revision!r}){what} could not be fetched from the hub: "
            f"{str(error).splitlines()[0]} Check the id, the connection and `hf auth login`; or take model=local model.path=DIR"
        ) from error
