"""What tells models apart: a folder's content, a hub model's commit in a fabricated cache."""

from __future__ import annotations

import shutil

import pytest

from tests.vdm_priors.tiny_teacher import tiny_teacher
from vdm_priors.errors import ModelError
from vdm_priors.families import load_teacher
from vdm_priors.fingerprint import fingerprint, hub_commit

NAME, OLD, NEW = "someone/tiny-video", "1" * 40, "2" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache with the tiny teacher in two revisions, `main` at OLD, and no network."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    repository = tmp_path / "hub" / "models--someone--tiny-video"
    for commit in (OLD, NEW):
        shutil.copytree(tiny_teacher().folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(OLD)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def no_network(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    hub_commit.cache_clear()
    yield repository
    hub_commit.cache_clear()


def test_a_hub_name_stands_for_its_commit(cache):
    assert fingerprint(NAME) == f"{NAME}@{OLD}" == fingerprint(cache / "snapshots" / OLD)
    (cache / "refs" / "main").write_text(NEW)
    assert fingerprint(NAME) == f"{NAME}@{OLD}"  # one process, one model
    hub_commit.cache_clear()
    assert fingerprint(NAME) == f"{NAME}@{NEW}"


def test_the_loaded_teacher_has_the_same_fingerprint(cache):
    assert load_teacher(cache / "snapshots" / NEW).fingerprint() == f"{NAME}@{NEW}"
    local = tiny_teacher()
    assert local.fingerprint() == fingerprint(local.folder) and "@" not in local.fingerprint()


def test_what_is_loaded_is_the_revision_that_was_named(cache, monkeypatch):
    """The hub's main moves on between the fingerprint and the loading."""
    from diffusers import CogVideoXPipeline, DiffusionPipeline

    asked, plain = [], DiffusionPipeline.load_config

    def load_config(name, revision=None, **how):
        if name != NAME:
            return plain(name, **how)
        asked.append(revision)
        return {"_class_name": "CogVideoXPipeline"}

    def download(name, revision=None, **how):
        asked.append(revision)
        return str(cache / "snapshots" / revision)

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    monkeypatch.setattr(CogVideoXPipeline, "load_config", plain)
    monkeypatch.setattr(CogVideoXPipeline, "download", download)
    told = fingerprint(NAME)
    (cache / "refs" / "main").write_text(NEW)
    assert load_teacher(NAME).fingerprint() == told == f"{NAME}@{OLD}"
    assert asked == [OLD, OLD]


def test_a_model_that_was_never_downloaded_is_asked_for(cache, monkeypatch):
    with pytest.raises(ModelError, match="someone/other is neither a folder nor in .*no network.*folder"):
        fingerprint("someone/other")

    class Info:
        sha = "3" * 40

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **how: Info)
    assert fingerprint("someone/other") == "someone/other@" + "3" * 40
