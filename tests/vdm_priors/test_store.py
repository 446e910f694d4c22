"""PriorStore: whole files or none, whoever writes and whatever breaks."""

from __future__ import annotations

import errno
import os
import signal
import threading

import pytest
import torch

from vdm_priors.errors import StoreError
from vdm_priors.grid import TokenGrid
from vdm_priors.prior import MotionPrior
from vdm_priors.store import Claims, PriorStore, content_key, file_digest
from vdm_priors.words import split_words

KEY = content_key(video="a", steps=5)


def make_prior(value: float = 1.0) -> MotionPrior:
    grid = TokenGrid.regular([[0.0, 1.0]], 4, 4)
    return MotionPrior(
        "moves", split_words("moves"), torch.full((1, 1, 4, 4), value), grid, torch.ones(1)
    )


@pytest.fixture
def store(tmp_path) -> PriorStore:
    return PriorStore(tmp_path / "priors")


def files(store: PriorStore) -> list[str]:
    return sorted(path.name for path in store.folder.rglob("*") if path.is_file())


def test_what_is_put_is_got(store):
    assert KEY not in store and store.keys() == []
    store.put(KEY, make_prior(0.5))
    assert KEY in store and store.keys() == [KEY]
    assert store.path(KEY).parent.name == KEY[:2]
    assert (store.get(KEY).maps == 0.5).all()
    assert content_key(video="b", steps=5) not in store
    store.put(KEY, make_prior(2.0))
    assert (store.get(KEY).maps == 2.0).all()
    store.discard(KEY)
    store.discard(KEY)
    assert KEY not in store


def test_a_missing_prior_is_named(store):
    with pytest.raises(StoreError, match=f"{KEY}.*cannot be read"):
        store.get(KEY)


@pytest.mark.parametrize("key", ["../../etc/passwd", "", "a.b", "a/b", "/abc"])
def test_a_key_never_leaves_the_folder(store, key):
    with pytest.raises(StoreError, match="cannot be a key"):
        store.put(key, make_prior())


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(store, monkeypatch, function):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(StoreError, match=f"{KEY}.*No space left on device.*free"):
            store.put(KEY, make_prior())
    assert files(store) == [] and KEY not in store
    store.put(KEY, make_prior())
    assert (store.get(KEY).maps == 1).all()


def test_a_failed_write_keeps_the_older_prior(store, monkeypatch):
    store.put(KEY, make_prior(0.5))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError):
        store.put(KEY, make_prior(2.0))
    assert (store.get(KEY).maps == 0.5).all()
    assert len(files(store)) == 1


def test_an_interrupted_write_leaves_nothing_behind(store, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.put(KEY, make_prior())
    assert files(store) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="cannot be written"):
        PriorStore(tmp_path / "file").put(KEY, make_prior())


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file_is_noticed(store, length):
    store.put(KEY, make_prior())
    path = store.path(KEY)
    path.write_bytes(path.read_bytes()[:length])
    assert KEY in store
    with pytest.raises(StoreError, match=f"{KEY}.*damaged.*extract the prior again"):
        store.get(KEY)


def test_a_flipped_byte_is_noticed_wherever_it_is(store):
    store.put(KEY, make_prior())
    path = store.path(KEY)
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        path.write_bytes(bytes(damaged))
        with pytest.raises(StoreError, match=KEY):
            store.get(KEY)


def test_writers_of_one_key_never_mix(store):
    problems: list[Exception] = []

    def write(value: float) -> None:
        try:
            for _ in range(5):
                store.put(KEY, make_prior(value))
                maps = store.get(KEY).maps
                assert maps.unique().numel() == 1
        except Exception as error:  # handed to the main thread
            problems.append(error)

    threads = [threading.Thread(target=write, args=(float(v),)) for v in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert files(store) == [f"{KEY}.safetensors"]
    assert store.keys() == [KEY]


def test_keys_follow_content_alone():
    assert content_key(b=1, a=[1, 2]) == content_key(a=(1, 2), b=1)
    assert len(KEY) == 32 and set(KEY) <= set("0123456789abcdef")
    assert len({content_key(text=t) for t in ("a", "b", "é", "e\u0301")}) == 4
    with pytest.raises(TypeError, match="content_key"):
        content_key(model=object())
    with pytest.raises(ValueError, match="content_key"):
        content_key(guidance=float("nan"))


def test_file_digest_follows_the_content(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"same")
    two.write_bytes(b"same")
    assert file_digest(one) == file_digest(two)
    one.write_bytes(b"other")
    assert file_digest(one) != file_digest(two)
    with pytest.raises(StoreError, match="nothing.*cannot be read"):
        file_digest(tmp_path / "nothing")


def test_file_digest_reads_an_unchanged_file_once(tmp_path, monkeypatch):
    import vdm_priors.store as store_module

    path = tmp_path / "clip"
    path.write_bytes(b"content")
    first = file_digest(path)

    def unexpected(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(store_module.hashlib, "file_digest", unexpected)
    assert file_digest(str(path)) == first


# ---- headers, left-overs, claims -----------------------------------------------------------------

def test_an_entry_says_what_the_whole_prior_says(store):
    prior = make_prior(0.5)
    prior.provenance.update(source="vdm", model="tiny", heads=[0.1] * 5000)  # longer than one read
    store.put(KEY, prior)
    entry, path = store.entry(KEY), store.path(KEY)
    assert (entry.key, entry.source, entry.model, entry.text, entry.words) == (KEY, "vdm", "tiny", "moves", ["moves"])
    assert entry.shape == prior.grid.shape and entry.provenance == prior.provenance
    assert (entry.bytes, entry.modified) == (path.stat().st_size, path.stat().st_mtime)
    with pytest.raises(StoreError, match="cannot be read"):
        store.entry(content_key(video="b"))


def test_an_entry_reads_the_header_alone(store):
    store.put(KEY, make_prior())
    path = store.path(KEY)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10] + bytes(10))  # damaged maps
    assert store.entry(KEY).text == "moves"
    with pytest.raises(StoreError):
        store.get(KEY)


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"\xff" * 64, (10**9).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"{}"])
def test_a_header_that_cannot_be_read_is_told(store, content):
    store.put(KEY, make_prior())
    store.path(KEY).write_bytes(content)
    with pytest.raises(StoreError, match=f"{KEY}.*damaged"):
        store.entry(KEY)


def test_keys_are_of_priors_alone(store):
    store.put(KEY, make_prior())
    for name in (".hidden.safetensors", "no key.safetensors", "notes.txt", f".{KEY}.safetensors.1.tmp"):
        (store.folder / KEY[:2] / name).touch()
    (store.folder / "zz").touch()
    assert store.keys() == [KEY]
    (store.folder / "file").touch()
    with pytest.raises(StoreError, match="cannot be read"):
        PriorStore(store.folder / "file").keys()


def test_left_over_files_are_those_of_old_killed_writes(store):
    store.put(KEY, make_prior())
    old, new = (store.path(KEY).with_name(f".{KEY}.safetensors.{n}.tmp") for n in range(2))
    old.touch(), new.touch()
    os.utime(old, (1.0, 1.0))
    assert store.leftovers() == [old] and store.leftovers(age=-1) == [old, new]


def test_claims_end_with_their_process(store):
    store.prepare()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        claims = Claims(store.folder).__enter__()
        os.write(write, b"1" if claims.take(KEY) else b"0")
        signal.pause()
    assert os.read(read, 1) == b"1"
    try:
        with Claims(store.folder) as claims:
            assert not claims.take(KEY) and claims.take("other")
            claims.release("other")
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert claims.take(KEY)
    finally:
        os.close(read), os.close(write)
    assert (store.folder / ".claims").stat().st_size == 0


def test_without_locks_only_one_process_goes_on(store, monkeypatch):
    import vdm_priors.store as store_module

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    store.prepare()
    monkeypatch.setattr(store_module.fcntl, "lockf", no_locks)
    with Claims(store.folder) as claims, pytest.raises(StoreError, match="cannot be locked .No locks available"):
        claims.take(KEY)
    with Claims(store.folder, needed=False) as claims:
        assert claims.take(KEY)
        claims.release(KEY)
