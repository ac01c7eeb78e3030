"""Checkpoints: written whole or not at all, newest and best kept, damage reported and survived."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import threading
import time

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import walk
from conftest import environment
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from walk import State, target

from timesformer_jax.checkpoints import convert
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.store import Checkpoints, DamagedCheckpoint, load_parameters
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformerConfig, abstract, parameters

MODEL = TimeSformerConfig(
    num_classes=3, image_size=8, num_frames=2, patch_size=4, hidden_size=32, depth=1, num_heads=1
)
METADATA = CheckpointMetadata(
    MODEL, ClipSpec(frames=2, crop=8, short_side=10), ("a", "b", "c"), {"rate": 0.1}
)


@pytest.fixture(scope="module")
def first():
    rng = np.random.default_rng(0)

    def draw(shape):
        return jnp.asarray(rng.random(shape.shape, np.float32))

    shapes = parameters(abstract(MODEL))
    return State(jax.tree.map(draw, shapes), jax.tree.map(draw, shapes))


def at(state, step):
    return jax.tree.map(lambda x: x + step, state)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def saved(directory, first, steps, **options):
    """Checkpoints of the steps; those with a top-1 are evaluated."""
    found = Checkpoints(directory, **options)
    for step, top1 in steps.items():
        found.save(step, at(first, step), {"position": step}, METADATA)
        if top1 is not None:
            found.record_validation(step, {"top1": top1, "top5": 1.0})
    found.wait()
    return found


def steps_in(directory):
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def two(first, tmp_path_factory):
    """A directory with steps 1 and 2, to copy."""
    directory = tmp_path_factory.mktemp("two")
    saved(directory, first, {1: None, 2: None}).close()
    return directory


@pytest.fixture
def directory(two, tmp_path):
    return pathlib.Path(shutil.copytree(two, tmp_path / "checkpoints"))


def test_what_is_saved_comes_back_on_any_mesh(first, directory):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())
    elsewhere = jax.tree.map(lambda x: x.update(sharding=everywhere), target(first))
    with contextlib.closing(Checkpoints(directory)) as found:
        for there in (target(first), elsewhere):
            state, progress = found.restore(2, there)
            assert_equal(state, at(first, 2))
            assert progress == {"position": 2}
        assert found.metadata(2) == METADATA
    assert_equal(load_parameters(directory / "1")[1], at(first, 1).params)


def test_save_returns_before_the_checkpoint_is_written(first, tmp_path, monkeypatch):
    # The write ends when a folder gets its last name; that is held up until save has returned.
    returned, held = threading.Event(), []
    rename = os.rename

    def hold(*paths, **options):
        held.append(returned.wait(timeout=60))
        return rename(*paths, **options)

    monkeypatch.setattr(os, "rename", hold)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    state = at(first, 7)
    with contextlib.closing(Checkpoints(tmp_path)) as found:
        found.save(7, state, {}, METADATA)
        overwrite(state)  # as the next step of training does
        assert not steps_in(tmp_path)
        returned.set()
        found.wait()
        assert held
        assert all(held)
        assert_equal(found.restore(7, target(first))[0], at(first, 7))


def test_the_newest_and_the_best_stay(first, tmp_path):
    steps = {1: 0.2, 2: 0.9, 3: 0.5, 4: None, 5: 0.9, 6: 0.1, 7: None, 8: None}
    with contextlib.closing(saved(tmp_path, first, steps, keep_newest=2, keep_best=1)) as found:
        assert steps_in(tmp_path) == found.steps() == [5, 7, 8]  # of equals the later
        assert found.best_step() == 5
    # It is known again when training goes on, and gives way to a better one.
    later = {9: 0.95, 10: None, 11: None}
    with contextlib.closing(saved(tmp_path, first, later, keep_newest=2, keep_best=1)) as found:
        assert steps_in(tmp_path) == [9, 10, 11]
        assert found.best_step() == 9
    assert_equal(load_parameters(tmp_path)[1], at(first, 11).params)
    for path in (tmp_path / "best", tmp_path / "9"):
        metadata, params = load_parameters(path)
        assert metadata == METADATA
        assert_equal(params, at(first, 9).params)
    assert_equal(convert.read(tmp_path / "best").load(), at(first, 9).params)


def test_no_best_gives_a_one_line_error(directory):
    with pytest.raises(InputError, match=r"none of its checkpoints was evaluated.*leave out /best"):
        load_parameters(directory / "best")
    (directory / "validation.json").write_text('{"1": {"top1"')
    with pytest.raises(InputError, match=r"validation\.json is damaged; remove it"):
        load_parameters(directory / "best")


def arrays(directory, item):
    """The file that holds an item's arrays; the smaller ones beside it hold trees of offsets."""
    folder = directory / "2" / item / "ocdbt.process_0" / "d"
    return max(folder.iterdir(), key=lambda p: p.stat().st_size)


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "an array file cut short": lambda d: half(arrays(d, "params")),
    "an array file missing": lambda d: arrays(d, "optimizer").unlink(),
    "an array file empty": lambda d: arrays(d, "params").write_bytes(b""),
    "a byte of an array": lambda d: flip(arrays(d, "params")),
    "a byte of the optimizer": lambda d: flip(arrays(d, "optimizer")),
    "a digit of the position": lambda d: (d / "2/progress/metadata").write_text('{"position": 3}'),
    "a digit of the metadata": lambda d: (d / "2/metadata/metadata").write_text(
        (d / "2/metadata/metadata").read_text().replace('"rate": 0.1', '"rate": 0.7')
    ),
    "no metadata": lambda d: shutil.rmtree(d / "2" / "metadata"),
    "no optimizer": lambda d: shutil.rmtree(d / "2" / "optimizer"),
    "the arrays' metadata": lambda d: half(d / "2" / "params" / "_METADATA"),
    "the tree of arrays": lambda d: flip(d / "2" / "optimizer" / "manifest.ocdbt"),
    "every file cut short": lambda d: [half(p) for p in (d / "2").rglob("*") if p.is_file()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(damage, first, directory, caplog):
    DAMAGES[damage](directory)

    def read(step):
        return found.metadata(step), found.restore(step, target(first))

    with contextlib.closing(Checkpoints(directory)) as found:
        step, (metadata, (state, progress)) = found.read_newest(read)
        assert (step, metadata, progress) == (1, METADATA, {"position": 1})
        assert_equal(state, at(first, 1))
        lines = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        told = [line for line in lines if "2 cannot be restored" in line]
        assert len(told) == 1
        assert told[0].endswith("the earlier step 1 is taken")
        assert "\n" not in told[0]
        # Step 2 is free to be saved anew, and what was found there is not lost.
        found.set_aside_after(1)
        found.save(2, at(first, 2), {"position": 2}, METADATA)
        found.wait()
        assert found.read_newest(read)[0] == 2
    assert (directory / "2.damaged").is_dir()


def test_flipped_bits_are_noticed_wherever_they_are(first, directory):
    """Not one of them, in files that are read, may give other numbers."""
    rng, noticed = random.Random(0), 0
    files = [p for p in (directory / "2").rglob("*") if p.is_file() and p.stat().st_size]
    with contextlib.closing(Checkpoints(directory, read_only=True)) as found:
        for path in files:
            whole = path.read_bytes()
            content = bytearray(whole)
            content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            try:
                assert found.metadata(2) == METADATA
                state, progress = found.restore(2, target(first))
                assert progress == {"position": 2}
                assert_equal(state, at(first, 2))
            except DamagedCheckpoint:
                noticed += 1
            path.write_bytes(whole)
    assert noticed > 4


def test_where_all_are_damaged_nothing_is_changed(first, directory):
    for step in (1, 2):
        (directory / str(step) / "metadata" / "metadata").write_text("{")
    before = sorted(p.relative_to(directory) for p in directory.rglob("*"))
    with pytest.raises(InputError, match=r"no checkpoint can be read: .*2 cannot.*1 cannot") as e:
        load_parameters(directory)
    assert "\n" not in str(e.value)
    with contextlib.closing(Checkpoints(directory)) as found, pytest.raises(InputError):
        found.read_newest(found.metadata)
    assert sorted(p.relative_to(directory) for p in directory.rglob("*")) == before


def use_old_names(step):
    """Makes the folder of a step look as before the first release."""
    fields = json.loads((step / "metadata" / "metadata").read_text())
    fields["clip"]["rate"] = fields["clip"].pop("frame_stride")
    (step / "metadata" / "metadata").write_text(json.dumps(fields))
    (step / "metadata").rename(step / "card")
    (step / "checksums").rename(step / "digest")


def test_a_checkpoint_saved_under_old_names_says_what_to_do(first, directory):
    use_old_names(directory / "2")
    message = r"2 was saved by an earlier version .*; run `timesformer convert .*2 model\.pyth"
    for path in (directory, directory / "2"):
        with pytest.raises(InputError, match=message) as e:
            load_parameters(path)
        assert "\n" not in str(e.value)
    with contextlib.closing(Checkpoints(directory)) as found:
        for read in (found.metadata, lambda step: found.restore(step, target(first))):
            with pytest.raises(InputError, match=message):
                found.read_newest(read)  # which does not take it for damaged
    assert_equal(load_parameters(directory / "1")[1], at(first, 1).params)


def test_metadata_with_fields_of_another_version_says_what_to_do(first, tmp_path):
    class OldMetadata:
        @staticmethod
        def to_json():
            fields = METADATA.to_json()
            fields["clip"]["rate"] = fields["clip"].pop("frame_stride")
            return fields

    with contextlib.closing(Checkpoints(tmp_path)) as found:
        found.save_model(1, first.params, OldMetadata)
    with pytest.raises(InputError, match=r"1 was saved by an earlier version .*; run `timesformer"):
        load_parameters(tmp_path)


@pytest.mark.processes
def test_killed_while_it_saves_it_goes_on_as_if_it_had_not_been(tmp_path):
    starts = []

    def saving():
        return any("tmp" in p.name for p in tmp_path.iterdir())

    for kill in (True, True, True, False):
        run = forked.Process(
            forked.run_file, walk.__file__, str(tmp_path), environment=environment()
        )
        starts.append(int(run.stdout.readline().split()[1]))
        if kill:
            while max(steps_in(tmp_path), default=0) < starts[-1] + 2 or not saving():
                assert run.poll() is None
                run.send_signal(signal.SIGCONT)
                time.sleep(0.001)
                run.send_signal(signal.SIGSTOP)  # so that it is still saving when it is killed
            run.kill()
            run.communicate()
            assert saving()
        else:
            assert run.communicate()[0] == "end\n"
    assert starts == sorted(set(starts))  # each went on from where the one before had come
    expected = walk.start()
    for _ in range(walk.STEPS):
        expected = walk.go_on(expected)
    with contextlib.closing(Checkpoints(tmp_path, read_only=True)) as found:
        assert found.steps() == [walk.STEPS - 1, walk.STEPS]
        assert_equal(found.restore(walk.STEPS, target(expected))[0], expected)


def test_gs_without_its_package_gives_a_one_line_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(InputError, match=r"google-cloud-storage: pip install '\.\[gcs\]'"):
        Checkpoints("gs://bucket/run")
