"""Checkpoints: what comes back is what was saved, or it is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from bnjax import files
from bnjax.checkpoint import Checkpoints, file_of, load
from bnjax.errors import CheckpointError, CheckpointWarning, DamagedCheckpointError


def states(offset=0):
    """Arrays as networks have them, and as they might."""
    tree = {
        "bn": {"params": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "count": (jnp.array([3, 4]),)},
        "half": jnp.full((2, 2), 1.5, jnp.bfloat16),
        "flag": jnp.array(True),
        "empty": jnp.zeros((2, 0)),
    }
    return jax.tree.map(lambda a: a + jnp.asarray(offset, a.dtype), tree)


def save(directory, epochs=(1, 2, 3), settings=""):
    checkpoints = Checkpoints(directory, settings)
    for number in epochs:
        checkpoints.save(number, states(number))
    return directory


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert [a.dtype for a in jax.tree.leaves(found)] == [a.dtype for a in jax.tree.leaves(expected)]


def test_the_last_comes_back_and_two_are_kept(tmp_path):
    assert Checkpoints(tmp_path / "none").restore("fresh") == (0, "fresh")
    save(tmp_path / "saved")
    epochs, found = Checkpoints(tmp_path / "saved").restore(states())
    assert epochs == 3
    assert_equal(found, states(3))
    assert_equal(Checkpoints(tmp_path / "saved").at(2, states()), states(2))
    kept = sorted(file.name for file in (tmp_path / "saved").iterdir())
    assert kept == ["epoch-002.safetensors", "epoch-003.safetensors"]


def test_more_than_a_thousand_epochs_are_in_order(tmp_path):
    assert Checkpoints(save(tmp_path, (999, 1000, 1001))).restore(states())[0] == 1001
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_has_named_arrays_and_says_what_it_is(tmp_path):
    arrays, metadata = load(file_of(save(tmp_path, settings="seed 0"), 3))
    assert metadata == {"epochs": "3", "settings": "seed 0"}
    assert set(arrays) == {"bn/params/kernel", "bn/count/0", "half", "flag", "empty"}
    assert arrays["half"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(arrays["bn/params/kernel"], np.arange(3.0, 9).reshape(2, 3))


def test_others_read_it(tmp_path):
    file = file_of(save(tmp_path), 3)
    with safetensors.safe_open(file, "np") as opened:
        assert opened.metadata()["epochs"] == "3"
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    jax.tree.map(np.testing.assert_array_equal, found, load(file)[0])


def test_pytorch_reads_it(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    found = load_file(file_of(save(tmp_path), 3))
    assert found["half"].dtype == torch.bfloat16
    np.testing.assert_array_equal(found["bn/params/kernel"], np.arange(3.0, 9).reshape(2, 3))


def test_arrays_that_lie_otherwise_in_memory_are_saved_as_they_read(tmp_path):
    transposed = np.arange(6.0, dtype=np.float32).reshape(2, 3).T
    Checkpoints(tmp_path).save(1, {"a": transposed})
    np.testing.assert_array_equal(load(file_of(tmp_path, 1))[0]["a"], transposed)


def test_whatever_byte_is_wrong_or_missing_is_noticed(tmp_path):
    file = file_of(save(tmp_path), 3)
    content = file.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        for damaged in (flipped, content[:place], content[:place] + content[place + 1 :]):
            file.write_bytes(damaged)
            with pytest.raises(DamagedCheckpointError, match="safetensors: it is damaged"):
                load(file)


def test_damaged_ones_are_set_aside_and_none_is_overwritten(tmp_path):
    contents = []
    for _ in range(2):
        file = file_of(save(tmp_path), 3)
        contents.append(file.read_bytes()[:-1])
        file.write_bytes(contents[-1])
        with pytest.warns(CheckpointWarning, match="an earlier state takes its place"):
            epochs, found = Checkpoints(tmp_path).restore(states())
        assert epochs == 2
        assert_equal(found, states(2))
    aside = sorted(tmp_path.glob("damaged-*-epoch-003.safetensors"))
    assert [file.read_bytes() for file in aside] == contents


def test_one_of_another_epoch_is_not_taken_for_it(tmp_path):
    save(tmp_path)
    file_of(tmp_path, 3).write_bytes(file_of(tmp_path, 2).read_bytes())
    with pytest.warns(CheckpointWarning, match="it holds the state after epoch 2"):
        assert Checkpoints(tmp_path).restore(states())[0] == 2


def test_one_of_other_settings_is_refused(tmp_path):
    save(tmp_path, settings="seed 0")
    with pytest.raises(CheckpointError, match="safetensors: of other settings"):
        Checkpoints(tmp_path, "seed 1").restore(states())
    assert Checkpoints(tmp_path, "seed 0").restore(states())[0] == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: {**tree, "flag": jnp.array([True])},
        lambda tree: {**tree, "half": tree["half"].astype(jnp.float16)},
        lambda tree: {**tree, "more": jnp.zeros(1)},
        lambda tree: {name: leaf for name, leaf in tree.items() if name != "flag"},
        lambda tree: {**tree, "bn": {"params": tree["bn"]["params"]["kernel"]}},
    ],
    ids=["shape", "dtype", "more", "less", "name"],
)
def test_one_of_another_structure_is_refused(tmp_path, change):
    with pytest.raises(CheckpointError, match="another version of the networks"):
        Checkpoints(save(tmp_path)).restore(change(states()))
    assert file_of(tmp_path, 3).exists()


def test_one_that_cannot_be_read_just_now_is_left_alone(tmp_path):
    file = file_of(save(tmp_path), 3)
    file.unlink()
    file.mkdir()
    with pytest.raises(OSError, match="directory") as caught:
        Checkpoints(tmp_path).restore(states())
    assert str(caught.value.filename) == str(file)
    assert file.is_dir()


@pytest.mark.parametrize("fails", ["write", "fsync", "rename"])
def test_a_save_that_fails_names_the_file_and_harms_no_other(tmp_path, monkeypatch, fails):
    def fail(*_):
        raise OSError(28, "No space left on device")

    save(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        if fails == "write":
            unfinished = tmp_path / ".epoch-004.safetensors.partial"
            unfinished.symlink_to("/dev/full")
        elif fails == "fsync":
            patch.setattr(files.os, "fsync", fail)
        else:
            patch.setattr(files.Path, "replace", fail)
        with pytest.raises(OSError, match="No space left on device") as caught:
            checkpoints.save(4, states(4))
    assert str(caught.value.filename) == str(file_of(tmp_path, 4))
    assert Checkpoints(tmp_path).restore(states())[0] == 3
