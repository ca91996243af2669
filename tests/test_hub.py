"""Checkpoints from a hub, here on the loopback device: what is fetched, and what is told when it goes wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub import constants

import sdipc_jax as sdipc
from sdipc_jax.checkpoints import hub, sources
from sdipc_jax.checkpoints.aliases import ALIASES, MOVED, Alias
from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.checkpoints.families import FAMILIES
from sdipc_jax.checkpoints.hub import Entry, choose
from sdipc_jax.checkpoints.load import read_config
from sdipc_jax.cli import main
from sdipc_jax.errors import InputError
from tests.fake_hub import COMMIT, REPOSITORY, FakeHub, serve

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def repository(tiny_folder: Path) -> dict[str, bytes]:
    """The tiny checkpoint as a repository has it, with what nobody should fetch."""
    files = {str(path.relative_to(tiny_folder)): path.read_bytes() for path in tiny_folder.rglob("*") if path.is_file()}
    extra = ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "all.safetensors"]
    return files | dict.fromkeys([*extra, "vae/model.onnx", "README.md", "evil/config.json"], b"not this one")


@pytest.fixture
def fake(
    repository: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeHub]:  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Half of a small file is several chunks.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(FakeHub(dict(repository))) as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        yield fake


def final_files(tmp_path: Path) -> list[str]:
    """Names under which programs would find a file."""
    return [path.name for path in (tmp_path / "cache").rglob("snapshots/*/**/*") if not path.is_dir()]


def refuse(*words: str) -> None:
    with pytest.raises(InputError) as caught:
        hub.fetch(REPOSITORY)
    message = str(caught.value)
    assert message.startswith(REPOSITORY)
    assert message.isprintable()
    for word in words:
        assert word in message


def test_a_checkpoint_from_the_hub(fake: FakeHub, tiny: sdipc.Bundle) -> None:
    found = sdipc.load(REPOSITORY)
    jax.tree.map(np.testing.assert_array_equal, found.params, tiny.params)
    assert found.config.origins == (("model", f"{REPOSITORY}@{COMMIT}"),)
    told = digests(found.config, None)
    assert told["hub/model"] == f"{REPOSITORY}@{COMMIT}"
    assert {name for name in told if name.startswith("unet/")} == {UNET, "unet/config.json"}
    fetched = fake.fetched()
    assert UNET in fetched
    assert "model_index.json" in fetched
    for name in ("README.md", "all.safetensors", "evil/config.json", "vae/model.onnx"):
        assert name not in fetched
    assert not [name for name in fetched if name.endswith(".bin") or "fp16" in name]
    # Again: what is there is not sent again.
    fake.requests.clear()
    hub.fetch(REPOSITORY)
    assert not fake.fetched()
    # And without a network.
    fake.fault = "down"
    assert hub.cached(REPOSITORY).commit == COMMIT


def test_parts_of_a_repository(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """For --vae and --text-encoder; that does not make the rest one that is there."""
    found = sources.find(REPOSITORY, parts=("vae",))
    assert {str(Path(name).parent) for name in fake.fetched()} == {"vae"}
    assert hub.cached(REPOSITORY) is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert sources.find(REPOSITORY, parts=("vae",)) == found
    with pytest.raises(InputError, match="not in the cache"):
        sources.find(REPOSITORY)


def test_a_commit_is_asked_for_once(fake: FakeHub) -> None:
    assert hub.fetch(REPOSITORY, COMMIT).commit == COMMIT
    assert not [path for _, path, _ in fake.requests if path == f"/api/models/{REPOSITORY}"]
    assert sources.find(f"{REPOSITORY}@{COMMIT}").origin == f"{REPOSITORY}@{COMMIT}"


@pytest.mark.parametrize("fault", ["redirect", "cut", "busy-once"])
def test_what_only_takes_longer(fake: FakeHub, fault: str, repository: dict[str, bytes]) -> None:
    fake.fault = fault
    folder = hub.fetch(REPOSITORY).folder
    assert (folder / UNET).read_bytes() == repository[UNET]
    if fault == "cut":
        # It goes on in the middle.
        assert any(wanted.startswith("bytes=") and wanted != "bytes=0-" for _, _, wanted in fake.requests)


@pytest.mark.parametrize(
    "fault, words",
    [
        ("missing", "no such repository, or one that is not public: check the id, or set HF_TOKEN"),
        ("private", "no such repository, or one that is not public: check the id, or set HF_TOKEN"),
        ("gated", "its authors ask for agreement first"),
        ("revision", "no such revision, expected a branch, a tag or a commit"),
        ("disabled", "the hub has disabled this repository"),
        ("busy", "too many requests, also after waiting"),
        ("no-commit", "the answer lacks the commit or size of a file, as behind a proxy"),
    ],
)
def test_what_is_refused_in_one_line(
    fake: FakeHub, fault: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    fake.fault = fault
    refuse(words)
    assert not final_files(tmp_path)


@pytest.mark.parametrize("fault, words", [("checksum", "has sha256"), ("size", "expected")])
def test_damaged_files_get_no_final_name(fake: FakeHub, fault: str, words: str, tmp_path: Path) -> None:
    fake.fault = fault
    refuse(words)
    assert not [name for name in final_files(tmp_path) if name.endswith(".safetensors")]
    assert not [path for path in (tmp_path / "cache").rglob("blobs/*") if path.stat().st_size > 100_000]
    fake.fault = ""
    assert (hub.fetch(REPOSITORY).folder / UNET).is_file()


def test_a_damaged_cache_is_found(fake: FakeHub) -> None:
    config = read_config(REPOSITORY)
    blob = (Path(config.folder) / UNET).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="the cache is damaged, delete the file and run `sdipc models fetch`"):
        digests(config, None)


def test_offline(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuse("not in the cache, and the network must not be used: run `sdipc models fetch org/name`")
    assert not fake.requests
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub.fetch(REPOSITORY)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fake.requests.clear()
    assert hub.fetch(REPOSITORY).commit == COMMIT
    assert hub.fetch(REPOSITORY, "main").commit == COMMIT
    assert not fake.requests


def test_no_network_and_a_cache(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port where nobody listens."""
    kept = hub.fetch(REPOSITORY)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.fetch(REPOSITORY) == kept
    with pytest.raises(InputError, match=r"other/name: .*expected the hub to answer: check the network"):
        hub.fetch("other/name")


def test_two_processes_at_once(fake: FakeHub, tmp_path: Path, repository: dict[str, bytes]) -> None:
    code = f"from sdipc_jax.checkpoints import hub; print(hub.fetch({REPOSITORY!r}).folder)"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache")}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (folder,) = folders
    assert (Path(folder) / UNET).read_bytes() == repository[UNET]


def test_the_command(fake: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["models", "fetch", REPOSITORY, "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)["records"]
    assert record["origin"] == f"{REPOSITORY}@{COMMIT}"
    assert record["digests"][UNET]
    monkeypatch.setitem(ALIASES, "small", Alias(REPOSITORY, COMMIT, "MIT", 0.1, "clip-l"))
    assert main(["models", "fetch", "small"]) == 0
    assert "files verified in" in (told := capsys.readouterr().out)
    assert told.rstrip().endswith("; to be shown pictures it needs clip-l too")
    assert main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["records"]
    assert [each["name"] for each in listed] == list(ALIASES)
    assert main(["models", "fetch"]) == 2
    assert "expected `sdipc models fetch NAME`" in capsys.readouterr().err


# What is chosen, and what names mean.


def names(*paths: str) -> list[str]:
    return [entry.path for entry in choose([Entry(path, 1) for path in paths], "org/name")]


def test_the_fewest_files_are_chosen() -> None:
    parts = ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
    stem = "diffusion_pytorch_model"
    unet, vae = f"unet/{stem}.safetensors", f"vae/{stem}.bf16.safetensors"
    assert set(names(*parts, unet, f"unet/{stem}.fp16.safetensors", vae)) == {*parts, unet, vae}
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    clip = ["config.json", "preprocessor_config.json", "model.safetensors.index.json", *shards]
    assert set(names(*clip, "open_clip_pytorch_model.bin", "model.fp16-00001-of-00001.safetensors")) == set(clip)
    some = choose([Entry(path, 1) for path in (*parts, unet, vae)], "org/name", parts=("vae",))
    assert {entry.path for entry in some} == {"vae/config.json", vae}
    with pytest.raises(InputError, match=rf"found unet/{stem}\.bin, which can run code when it is opened"):
        names(*parts, f"unet/{stem}.bin")
    with pytest.raises(InputError, match="found no weights in it"):
        names("README.md")


def test_aliases_and_moved_repositories() -> None:
    assert {"sd14", "sd15", "sd21", "sd21-base", "sdxl", "sdxl-turbo"} <= set(ALIASES)
    for alias in ALIASES.values():
        assert hub.REPOSITORY.fullmatch(alias.repository)
        assert hub._COMMIT.fullmatch(alias.commit)
        assert alias.clip is None or alias.clip in ALIASES
        assert alias.repository not in MOVED
    for family in FAMILIES:
        assert family.clip in ALIASES
    with pytest.raises(InputError, match=r"^stable-diffusion-v1-5/stable-diffusion-v1-5: not in the cache"):
        sources.find("runwayml/stable-diffusion-v1-5")


def test_names_that_mean_nothing(tmp_path: Path) -> None:
    for name in ("sd51", "a/b/c", str(tmp_path / "missing"), "x.safetensors", "dir/x.safetensors"):
        with pytest.raises(InputError, match=r"no such folder or file, expected 'embedded', sd14"):
            sources.find(name)
    with pytest.raises(InputError, match="expected an id for --revision"):
        sources.find(tmp_path, "main")
    with pytest.raises(InputError, match="expected one of them: leave one out"):
        sources.find("org/name@main", "main")


@pytest.mark.parametrize(
    "files, name, expected",
    [
        (["pytorch_lora_weights.safetensors", "other.safetensors"], "", "pytorch_lora_weights.safetensors"),
        (["style.safetensors", "style.bin", "README.md"], "", "style.safetensors"),
        (["a.safetensors", "deep/b.safetensors"], "/deep/b.safetensors", "deep/b.safetensors"),
    ],
)
def test_a_lora_from_the_hub(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, files: list[str], name: str, expected: str
) -> None:
    fake.files = {file: file.encode() for file in files}
    for at in ("", f"@{COMMIT}"):
        found = sources.find_lora(f"{REPOSITORY}{at}{name}")
        assert found.read_bytes() == expected.encode()
    assert fake.fetched() == {expected}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert sources.find_lora(f"{REPOSITORY}/{expected}") == found


def test_a_repository_of_several_loras_asks_for_one(fake: FakeHub, tmp_path: Path) -> None:
    fake.files = {"a.safetensors": b"a", "b.safetensors": b"b"}
    with pytest.raises(InputError, match=r"found a.safetensors, b.safetensors, expected one LoRA file: name it, as in"):
        sources.find_lora(REPOSITORY)
    with pytest.raises(InputError, match=r"expected c.safetensors: name it"):
        sources.find_lora(f"{REPOSITORY}/c.safetensors")
    # Files come first, and what is no id is left to who reads it.
    assert sources.find_lora(tmp_path / "a.safetensors") == tmp_path / "a.safetensors"
    assert sources.find_lora("folder/a.safetensors") == Path("folder/a.safetensors")
