"""Models of the Hugging Face hub, into the hub's own cache: whole ones, and the files that tell their sizes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def download(model_id: str, revision: str) -> Path:
    """The folder of a hub model: configuration, tokenizer and safetensors only, never pickles."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]  # that one for its licence
    with _errors_named(model_id, revision):
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns))


def fetch(model_id: str, revision: str, names: tuple[str, ...], local: bool = False) -> Path:
    """The folder with some files of a hub model. local: only if they are here, without asking the hub."""
    from huggingface_hub import hf_hub_download

    for name in names:
        with _errors_named(model_id, revision, f": {name}"):
            path = Path(hf_hub_download(model_id, name, revision=revision, local_files_only=local))
    return path.parent


@contextmanager
def _errors_named(model_id: str, revision: str, what: str = "") -> Iterator[None]:
    """The hub's errors as ValueErrors that name the configuration's keys and say what to do."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (OSError, HFValidationError) as error:  # hub and connection errors are OSErrors
        raise ValueError(
            f"model.id={model_id!r} (model.revision={revision!r}){what} could not be fetched from the hub: "
            f"{str(error).splitlines()[0]} Check the id, the connection and `hf auth login`; or take model=local model.path=DIR"
        ) from error
