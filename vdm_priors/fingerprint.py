"""What a model is, for keys and records: the content of a folder, or the hub's commit.

    fingerprint("models/my-teacher")     # 32 hex digits: a hash of its configurations and weights
    fingerprint("THUDM/CogVideoX-2b")    # "THUDM/CogVideoX-2b@<commit>"; that commit's folder in the
                                         # hub's cache has the same one

Importing this file loads no model library.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from vdm_priors.errors import ModelError
from vdm_priors.store import content_key, file_digest

HASHED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
INDEX_FILES = ["model_index.json", "config.json"]  # of a diffusers pipeline, of a transformers model
CONFIGURATIONS = ["model_index.json", "*/config.json", "*/scheduler_config.json"]
COMMIT = re.compile(r"[0-9a-f]{40}")
REPOSITORY = "models--"  # how the hub's cache names a model's folder: models--owner--name/snapshots/<commit>
PATIENCE = 10.0  # seconds for the hub's answer


def fingerprint(path_or_hub: str | Path) -> str:
    """A string that differs for different models: content of a local folder, or name and commit of a hub model.

    Raises ModelError if a hub name's commit is neither in the cache nor to be had from the hub, and
    StoreError if a file of the folder cannot be read.
    """
    folder = Path(path_or_hub)
    if not folder.is_dir():
        return f"{path_or_hub}@{hub_commit(str(path_or_hub))}"
    place = folder.resolve()
    repository = place.parent.parent.name
    if COMMIT.fullmatch(place.name) and place.parent.name == "snapshots" and repository.startswith(REPOSITORY):
        return f"{repository.removeprefix(REPOSITORY).replace('--', '/')}@{place.name}"
    files = sorted({file for kind in HASHED_FILES for file in folder.rglob(kind)})
    return content_key(files={file.relative_to(folder).as_posix(): file_digest(file) for file in files})


def configuration_folder(path_or_hub: str | Path) -> Path:
    """A folder with a model's JSON files: its own, or those of a hub model, fetched without weights.

    Raises ModelError if a hub name's cannot be had.
    """
    if Path(path_or_hub).is_dir():
        return Path(path_or_hub)
    from huggingface_hub import snapshot_download

    name, commit = str(path_or_hub), hub_commit(str(path_or_hub))
    try:
        return Path(snapshot_download(name, revision=commit, allow_patterns=CONFIGURATIONS))
    except Exception as error:  # many kinds; all mean: not to be had
        raise ModelError(
            f"The configurations of {name} could not be had from the hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Check the network and your access, or set the model to the folder "
            f"of a copy: `hf download {name} --local-dir FOLDER` where there is a network."
        ) from error


@lru_cache(maxsize=64)
def hub_commit(name: str) -> str:
    """The commit (40 hex digits) that a hub name stands for, the same one as long as this process runs.

    The commit that is on this machine, so that a name means the same tomorrow and without a
    network; only a model that was never downloaded is asked for at the hub. Raises ModelError
    if that fails too.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        snapshot = snapshot_download(name, allow_patterns=INDEX_FILES, local_files_only=True)
        return Path(snapshot).name
    except Exception:  # not in the cache; the client raises several kinds for that
        pass
    try:
        commit = HfApi().model_info(name, timeout=PATIENCE).sha
    except Exception as error:  # many kinds; all mean: not to be had
        raise ModelError(
            f"The model {name} is neither a folder nor in this machine's hub cache, and could not be "
            f"found on the hub ({type(error).__name__}: {' '.join(str(error).split())[:200]}). Check the "
            f"name, the network and your access, or set the model to the folder of a copy: `hf download {name} "
            f"--local-dir FOLDER` where there is a network."
        ) from error
    return str(commit)
