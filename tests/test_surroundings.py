"""Machines, file systems and switches that are not as usual: the work is done, or refused in one line."""

import contextlib
import errno
import fcntl
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from sdipc_jax import Bundle, InputError, cli, compilation, files, generate, load, parallel
from sdipc_jax.batch import storage
from sdipc_jax.batch.settings import BatchSettings
from sdipc_jax.checkpoints.tensors import to_safetensors
from sdipc_jax.commands.inputs import read_latents
from sdipc_jax.errors import printable
from sdipc_jax.interruption import locked, try_lock
from sdipc_jax.sampling.noise import draw_noise, keys_of
from sdipc_jax.settings import READ_BY_YAML, Defaults
from sdipc_jax.tuning.config import read_run

ROOT = Path(cli.__file__).parents[1]


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    given = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"} | environment
    command = [sys.executable, "-m", "sdipc_jax.cli", *map(str, arguments)]
    return subprocess.run(command, env=given, capture_output=True, text=True)


# Processes.


@pytest.mark.parametrize("platforms", ["cuda", "nonsense"])
def test_a_device_that_is_not_there_is_refused_in_one_line(platforms: str) -> None:
    if platforms == "cuda" and Path("/dev/nvidia0").exists():
        pytest.skip("there is one")
    done = run("vary", ROOT / "examples/owl.png", JAX_PLATFORMS=platforms, JAX_ENABLE_COMPILATION_CACHE="false")
    assert done.returncode == 2, done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("sdipc: ")]
    assert len(message) == 1
    assert message[0].startswith(f"sdipc: JAX_PLATFORMS is {platforms}, but no such device works here")
    assert len(message[0]) < 500
    assert "Traceback" not in done.stderr


def test_a_terminal_that_cannot_say_a_name_gets_it_in_ascii(tmp_path: Path, tiny_folder: Path) -> None:
    picture = tmp_path / "žluťoučký-猫.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 300, 3), np.uint8).repeat(4, 0)).save(picture)
    output = tmp_path / "kočka.safetensors"
    done = run(
        *("prompt", picture, "--model", tiny_folder, "--scale", "5", "--output", output),
        PYTHONIOENCODING="ascii",
        JAX_ENABLE_COMPILATION_CACHE="false",
    )
    assert done.returncode == 0, done.stderr
    assert output.exists()
    assert r"ko\u010dka.safetensors" in done.stdout
    again = run("prompt", picture, "--model", tiny_folder, "--output", output, PYTHONIOENCODING="cp1252")
    assert again.returncode == 2
    assert r"ko\u010dka.safetensors" in again.stderr


def test_names_are_shown_as_the_stream_can_say_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        encoding: Any = "ascii"

    monkeypatch.setattr(sys, "stdout", Stream)
    assert printable("é.png") == r"'\xe9.png'"
    for encoding, name in (("utf-8", "é"), (None, "é"), ("latin-1", "é"), ("ascii", "e")):
        Stream.encoding = encoding
        assert printable(name) == name


@pytest.mark.parametrize(
    "arguments", [("text", "-red apple"), ("vary", "-x y.png"), ("text", "a", "--negative-prompt", "-b")]
)
def test_a_text_that_begins_with_a_dash_says_what_to_do(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert f"found '{arguments[-1]}', which begins with a dash: put -- before it" in error
    assert error.count("\n") == 1


def test_what_the_advice_says_works(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in [("--model", "/none", "--", "-red apple"), ("a", "--negative-prompt=-b", "--model", "/none")]:
        assert cli.main(["text", *arguments]) == 2
        assert "/none" in capsys.readouterr().err
    assert cli.main(["text", "a", "--heigth", "4"]) == 2
    assert "dash" not in capsys.readouterr().err


# Flags, caches, homes.


@pytest.mark.parametrize("flags", ["flags.txt", " /etc/flags", "C:\\flags"])
def test_a_file_of_flags_is_left_alone(monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    compilation.use_eigen()
    assert os.environ["XLA_FLAGS"] == flags


def test_a_file_of_flags_is_read(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "flags").write_text("--xla_backend_optimization_level=0\n")
    arguments = ("spectrum", "--model", tiny_folder, "--output-dir", tmp_path / "out", "--scale", "5")
    done = run(*arguments, XLA_FLAGS=str(tmp_path / "flags"), JAX_ENABLE_COMPILATION_CACHE="false")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fault", ["no home", "a file", "read-only"])
def test_a_cache_that_cannot_be_had_is_a_note(
    fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compilation, "is_told_where_to_keep", lambda: False)
    if fault == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", lambda user: {}[user])
    elif fault == "a file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert compilation.keep_compiled() is None
    assert cli.main(["text", "a", "--model", "/none"]) == 2
    note, refusal = capsys.readouterr().err.splitlines()
    assert note == "sdipc: compiled programs are not kept: the cache folder cannot be written"
    assert "/none" in refusal


# File systems.


def failing(code: int) -> Any:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_a_note(code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(code))
    with locked(tmp_path / "run") as note:
        assert note == f"{tmp_path / 'run'} cannot be locked: start no second process there"
    storage.write(storage.epath.Path(tmp_path / "job.json"), b"{}")
    assert (tmp_path / "job.json").read_bytes() == b"{}"
    # What another process may be writing stays.
    left = tmp_path / storage.temporary_name("shard")
    left.touch()
    os.close(storage.hold(left))
    storage.remove_leftovers(storage.epath.Path(tmp_path), "shard")
    assert left.exists()
    monkeypatch.undo()
    storage.remove_leftovers(storage.epath.Path(tmp_path), "shard")
    assert not left.exists()


def test_a_lock_that_another_process_holds_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path) as note:
        assert note is None
        with pytest.raises(InputError, match=f"process {os.getpid()} is at work there"), locked(tmp_path):
            pass
        with (tmp_path / "lock").open() as stream, pytest.raises(BlockingIOError):
            try_lock(stream.fileno())


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_folders_without_fsync_are_passed_over(code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: failing(code)() if os.path.isdir(f"/proc/self/fd/{file}") else fsync(file)
    )
    files.write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_other_faults_of_fsync_are_told(code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "fsync", failing(code))
    with pytest.raises(InputError, match=os.strerror(code)):
        files.write_atomically(tmp_path / "file", b"content")


# Launchers.


@pytest.mark.parametrize(
    "variables, launcher, process",
    [
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "SLURM_NTASKS", (0, 4)),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2"}, "OMPI_COMM_WORLD_SIZE", (2, 3)),
        ({"SLURM_NTASKS": "4"}, None, (0, 1)),
        (
            {"SDIPC_PROCESS_COUNT": "2", "SDIPC_PROCESS_INDEX": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"},
            "SDIPC_PROCESS_COUNT",
            (1, 2),
        ),
    ],
)
def test_who_says_which_process_this_is(
    variables: dict[str, str], launcher: str | None, process: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = BatchSettings(job=Path("job.yaml"))
    assert (settings.launcher(), settings.process()) == (launcher, process)
    told = BatchSettings(job=Path("job.yaml"), process_index=0, process_count=1)
    assert (told.launcher(), told.process()) == (None, (0, 1))


# JAX's own switches.


@contextlib.contextmanager
def switched(name: str, value: Any) -> Any:
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def test_draws_are_pinned_whatever_jax_is_told() -> None:
    keys = keys_of(np.array([0, 7]), np.array([0, 3]))
    expected = np.asarray(draw_noise(keys, (4, 3, 5)))
    with switched("jax_threefry_partitionable", False):
        other = jax.vmap(lambda key: jax.random.normal(key, (4, 3, 5)))(keys)
        found = draw_noise(keys_of(np.array([0, 7]), np.array([0, 3])), (4, 3, 5))
        inside = jax.jit(lambda keys: draw_noise(keys, (4, 3, 5)))(keys)
    assert not np.array_equal(other, expected)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(inside, expected)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(draw_noise(keys_of(np.array([0, 7]), np.array([0, 3])), (4, 3, 5)), expected)


@pytest.mark.parametrize("sampler", ["ddim", "euler-a"])
def test_pictures_are_the_same_under_any_switch(tiny: Bundle, sampler: Any) -> None:
    shape = (1, tiny.config.tokens.length, tiny.config.unet.cross_attention_dim)
    options: Any = {"seeds": 3, "steps": 2, "sampler": sampler, "guidance_scale": 2.0}
    context = jax.numpy.asarray(np.random.default_rng(0).standard_normal(shape), np.float32)
    expected = generate(tiny, context, **options)
    with switched("jax_threefry_partitionable", False), switched("jax_numpy_rank_promotion", "raise"):
        np.testing.assert_array_equal(generate(tiny, context, **options), expected)


def test_loading_moves_nothing_that_it_does_not_say(tiny_folder: Path) -> None:
    with jax.transfer_guard("disallow"):
        assert load(str(tiny_folder)).params


# Values that are not what they look like.


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2", "I32", "BF16", "F16"])
def test_latents_of_another_type_are_refused_by_name(name: str, tmp_path: Path) -> None:
    size = {"I32": 4, "BF16": 2, "F16": 2}.get(name, 1)
    header = f'{{"latents":{{"dtype":"{name}","shape":[1,4,8,8],"data_offsets":[0,{256 * size}]}}}}'.encode()
    path = tmp_path / "latents.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(256 * size))
    shown = {"BF16": "bfloat16", "F16": "float16"}.get(name, name)
    with pytest.raises(InputError, match=rf"found latents of {shown} \(1, 4, 8, 8\), expected 'latents' of float32"):
        read_latents(path, (1, 4, 8, 8))
    save_file({"latents": np.zeros((1, 4, 8, 8), np.float32)}, path)
    assert read_latents(path, (1, 4, 8, 8)).dtype == np.float32


@pytest.mark.parametrize("classes", ["[no, yes]", "[007]", "[on]", "{no: nothing}", "{cat: off}", "[cat, 1.50]"])
def test_classes_that_yaml_reads_as_something_else(classes: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {tmp_path}\noutput_dir: {tmp_path}\nclasses: {classes}\n")
    with pytest.raises(InputError, match=r"classes is .*, expected names.*, since YAML reads no"):
        read_run(path, "ct")
    path.write_text(f"data: {tmp_path}\noutput_dir: {tmp_path}\nclasses: ['no', '007']\n")
    assert read_run(path, "ct").classes == {"no": "no", "007": "007"}


@pytest.mark.parametrize("line", ["caption: no", "model: 007", "data: 2024"])
def test_texts_that_yaml_reads_as_something_else(line: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"data: {tmp_path}\noutput_dir: {tmp_path}\n".replace("data:", "classes: null #") + "data: x\n" + line
    )
    with pytest.raises(InputError, match=READ_BY_YAML.split(":")[0]):
        read_run(path, "ct")


@pytest.mark.parametrize("value", ["x" * 10**6, list(range(10**5)), b"\xff" * 10**6])
def test_what_was_found_is_cut(value: Any) -> None:
    with pytest.raises(InputError, match=r"^steps is .*\.\.\..*, expected") as error:
        Defaults(steps=value, height=8, width=8)
    assert len(str(error.value)) < 500


def test_the_same_tensors_are_the_same_bytes() -> None:
    arrays = {"b": np.ones((2, 3), np.float32), "a": np.zeros(4, np.float32)}
    metadata = {name: name * 3 for name in "the quick brown fox jumps over".split()}
    backwards = dict(reversed(metadata.items()))
    assert len({to_safetensors(arrays, each) for each in (metadata, backwards) * 20}) == 1


def test_the_same_prompt_twice_is_the_same_file(tiny_folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(picture)
    written = []
    for name in "ab":
        output = tmp_path / f"{name}.safetensors"
        arguments = ["prompt", picture, "--model", tiny_folder, "--scale", 5, "--output", output, "--quiet"]
        assert cli.main([str(each) for each in arguments]) == 0
        written.append(output.read_bytes())
    assert written[0] == written[1]


def test_devices_that_are_there_are_no_fault() -> None:
    parallel.check_devices()
