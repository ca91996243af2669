"""Words for pictures, and pictures for words, in the joint space."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdipc_jax import cli
from sdipc_jax.checkpoints.load import read_config
from sdipc_jax.checkpoints.text_tower import load_text_tower
from sdipc_jax.compilation import cache_folder
from sdipc_jax.errors import InputError
from sdipc_jax.prompts import joint
from sdipc_jax.prompts.calibration import caption_vectors
from sdipc_jax.prompts.joint import JointSpace, KeptVectors
from sdipc_jax.prompts.word_bank import everyday_words, read_words
from sdipc_jax.prompts.words import Bank, centred, difference, encode_words, mixes_of, nearest

EXAMPLES = Path(__file__).parent.parent / "examples"
GIRAFFE, OWL = EXAMPLES / "giraffe.png", EXAMPLES / "owl.png"


def random_bank(count: int = 12, width: int = 32) -> Bank:
    vectors = np.random.default_rng(0).normal(size=(count, width))
    return Bank(
        tuple(f"word {place}" for place in range(count)), vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.main([*map(str, arguments)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bank_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bank") / "words.txt"
    path.write_text("taxi\nowl\n\ngiraffe\nowl\nhouse\nviolin\n")
    return path


class TestWords:
    def test_the_built_in_list(self) -> None:
        words = everyday_words()
        assert 2500 < len(words) < 4000
        assert len(set(words)) == len(words)
        assert all(word == " ".join(word.split()) and word for word in words)
        assert {"cat", "at night", "watercolor painting", "red umbrella", "laughing face"} <= set(words)

    def test_a_list_of_ones_own(self, bank_file: Path, tmp_path: Path) -> None:
        assert read_words(bank_file) == ("taxi", "owl", "giraffe", "house", "violin")
        for content, expected in ((b"\n \n", "found 0 words"), (b"\xff\xfe\x00", "no UTF-8")):
            (tmp_path / "bad.txt").write_bytes(content)
            with pytest.raises(InputError, match=expected):
                read_words(tmp_path / "bad.txt")

    def test_the_nearest_come_first(self) -> None:
        bank = random_bank()
        (found,) = nearest(bank, 7 * bank.vectors[3:4] + 0.1 * bank.vectors[5], 12)
        assert found[0][0] == "word 3"
        cosines = [cosine for _, cosine in found]
        assert cosines == sorted(cosines, reverse=True)
        assert len(found) == 12

    def test_templates_are_averaged(self) -> None:
        tower = load_text_tower(read_config("embedded"))
        bank = encode_words(tower, ["red", "owl"], ("{}", "a photo of {}"))
        each = caption_vectors(tower, ["owl", "a photo of owl"])
        mean = (each / np.linalg.norm(each, axis=1, keepdims=True)).mean(axis=0)
        np.testing.assert_allclose(bank.vectors[1], mean / np.linalg.norm(mean), atol=1e-6)
        with pytest.raises(InputError, match="for the word"):
            encode_words(tower, ["red"], ("photo",))


class TestMix:
    def test_a_sum_is_found_again(self) -> None:
        bank = random_bank()
        weights = {1: 0.8, 4: 0.5, 9: 0.3}
        vector = sum(weight * bank.vectors[place] for place, weight in weights.items())
        length = np.linalg.norm(vector)
        (mix,) = mixes_of(bank, vector[None], 6)
        assert mix.residual < 1e-6
        found = {word: weight for word, weight in mix.words if weight > 1e-3}
        assert found == pytest.approx({f"word {place}": weight / length for place, weight in weights.items()}, abs=1e-3)

    def test_weights_are_not_negative_and_more_words_leave_less(self) -> None:
        bank = random_bank()
        vector = np.random.default_rng(1).normal(size=32)
        mixes = [mixes_of(bank, vector[None], most)[0] for most in range(6)]
        residuals = [mix.residual for mix in mixes]
        assert residuals == sorted(residuals, reverse=True)
        assert residuals[0] == pytest.approx(1)
        assert all(weight > 0 for mix in mixes for _, weight in mix.words)
        # What is left has nothing in common with the words of the sum.
        places = [bank.words.index(word) for word, _ in mixes[-1].words]
        left = centred(vector[None], 0.0)[0] - np.array([w for _, w in mixes[-1].words]) @ bank.vectors[places]
        np.testing.assert_allclose(bank.vectors[places] @ left, 0, atol=1e-9)

    def test_several_at_once_are_each_alone(self) -> None:
        bank, vectors = random_bank(), np.random.default_rng(2).normal(size=(5, 32))
        vectors[3] = -bank.vectors.mean(axis=0)
        together = mixes_of(bank, vectors, 4)
        for vector, mix in zip(vectors, together, strict=True):
            (alone,) = mixes_of(bank, vector[None], 4)
            assert [word for word, _ in mix.words] == [word for word, _ in alone.words]
            assert mix.residual == pytest.approx(alone.residual, abs=1e-12)

    def test_an_opposite_has_no_sum(self) -> None:
        bank = random_bank(1)
        assert mixes_of(bank, -bank.vectors[:1], 3) == mixes_of(bank, -bank.vectors[:1], 0)

    def test_centres_take_away_what_all_share(self) -> None:
        bank, shared = random_bank(), np.full(32, 0.4)
        away = Bank(bank.words, centred(bank.vectors + shared, 0.0))
        picture = away.vectors[2] + np.full(32, -0.7)
        mean = np.mean([centred((each - 0.7)[None], 0.0)[0] for each in away.vectors], axis=0)
        (mix,) = mixes_of(away, picture[None], 1, words_centre=away.centre, pictures_centre=mean)
        assert mix.words[0][0] == "word 2"

    def test_differences_turn_around(self) -> None:
        bank = random_bank()
        more, less = difference(bank, bank.vectors[2], bank.vectors[7], 3)
        assert (more[0][0], less[0][0]) == ("word 7", "word 2")
        assert difference(bank, bank.vectors[7], bank.vectors[2], 3) == (less, more)
        with pytest.raises(InputError, match="the same vector"):
            difference(bank, bank.vectors[2], 2 * bank.vectors[2], 3)


class TestCommands:
    def test_words(self, bank_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        record, other = run(capsys, "words", GIRAFFE, OWL, "--bank", bank_file, "--top", 2, "--mix", 3)["records"]
        assert record["words"][0]["word"] == "giraffe"
        assert other["words"][0]["word"] == "owl"
        assert [len(each["words"]) for each in (record, other)] == [2, 2]
        assert record["mix"][0]["word"] == "giraffe"
        assert 0 < record["residual"] < 1

        # A second time from the cache: no text is encoded, and the answer is the same.
        arguments = ("words", GIRAFFE, "--bank", bank_file, "--top", 2, "--mix", 3)
        with monkeypatch.context() as patch:
            patch.setattr(joint, "encode_words", None)
            assert run(capsys, *arguments)["records"][0]["words"] == record["words"]

        # A damaged file is made anew.
        for kept in cache_folder("words").iterdir():
            kept.write_bytes(kept.read_bytes()[:-3] + b"abc")
        assert run(capsys, *arguments)["records"][0]["words"] == record["words"]

        (changed,) = run(capsys, "words", GIRAFFE, "--against", OWL, "--bank", bank_file)["records"]
        assert (changed["more"][0]["word"], changed["less"][0]["word"]) == ("giraffe", "owl")
        capsys.readouterr()
        assert cli.main(["words", str(GIRAFFE), "--bank", str(bank_file), "--top", "1"]) == 0
        assert "nearest giraffe 0." in capsys.readouterr().out

    def test_what_cannot_be_kept_is_a_note(
        self, bank_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sdipc_jax.prompts.kept.private_folder", lambda name: None)
        found = run(capsys, "words", GIRAFFE, "--bank", bank_file, "--top", 1)
        assert found["records"][0]["words"][0]["word"] == "giraffe"
        assert any("the words are not kept" in note for note in found["notes"])

    def test_bad_input(self, bank_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "missing.txt" in refuse(capsys, "words", GIRAFFE, "--bank", tmp_path / "missing.txt")
        assert "at least 30" in refuse(capsys, "words", GIRAFFE, "--mean-pictures", EXAMPLES, "--bank", bank_file)
        assert "missing.png" in refuse(capsys, "words", tmp_path / "missing.png", "--bank", bank_file)
        assert "no such file" in refuse(capsys, "search", tmp_path / "missing.png", EXAMPLES)
        assert "without pictures" in refuse(capsys, "search", "owl", tmp_path)

    def test_search(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        found = run(capsys, "search", "giraffe", EXAMPLES, "--top", 3)["records"]
        assert found[0]["input"] == str(GIRAFFE)
        assert len(found) == 3
        # No picture of the folder is encoded twice; a picture finds itself.
        encoded: list[int] = []
        encode = JointSpace.pictures

        def counted(self: JointSpace, pixels: Any) -> np.ndarray:
            encoded.append(len(pixels))
            return encode(self, pixels)

        monkeypatch.setattr(JointSpace, "pictures", counted)
        first = run(capsys, "search", OWL, EXAMPLES, "--top", 1)["records"][0]
        assert (first["input"], first["cosine"]) == (str(OWL), pytest.approx(1, abs=1e-3))
        assert encoded == [1]

        # What `prompt` and `batch` wrote ranks pictures as the folder does.
        prompts = tmp_path / "prompts.safetensors"
        assert cli.main(["prompt", *map(str, (GIRAFFE, OWL)), "--output", str(prompts), "--quiet"]) == 0
        ranked = run(capsys, "search", "giraffe", prompts)["records"]
        assert [each["input"] for each in ranked] == [str(GIRAFFE), str(OWL)]
        assert ranked[0]["cosine"] == pytest.approx(found[0]["cosine"], abs=2e-3)

        job = tmp_path / "job.yaml"
        job.write_text(f"source: {EXAMPLES}\noutput_dir: {tmp_path / 'vectors'}\nvectors: true\n")
        assert cli.main(["batch", str(job), "--quiet"]) == 0
        kept = run(capsys, "search", "giraffe", tmp_path / "vectors", "--top", 1)["records"]
        assert Path(kept[0]["input"]).name == "giraffe.png"
        assert kept[0]["cosine"] == pytest.approx(found[0]["cosine"], abs=5e-3)

        record = json.loads((tmp_path / "vectors" / "job.json").read_text())
        (weights,) = (name for name in record["checkpoint"] if name.startswith("clip/") and "safetensors" in name)
        record["checkpoint"][weights] = "another"
        (tmp_path / "vectors" / "job.json").write_text(json.dumps(record))
        assert "another CLIP" in refuse(capsys, "search", "giraffe", tmp_path / "vectors")
        save_file({"other": np.zeros(2, ml_dtypes.bfloat16)}, tmp_path / "other.safetensors", {"files": '["a"]'})
        assert "no vectors" in refuse(capsys, "search", "giraffe", tmp_path / "other.safetensors")


def test_kept_vectors_come_back(tmp_path: Path) -> None:
    kept = KeptVectors("tried", {"by": str(tmp_path)}, "they are")
    assert kept.read() is None
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    kept.write(["a", "b"], vectors)
    names, found = kept.read() or ([], None)
    assert names == ["a", "b"]
    np.testing.assert_array_equal(found, vectors)
    assert kept.path is not None
    assert set(load_file(kept.path)) == {"vectors"}
