"""Of a checkpoint nothing is believed that was not checked: each hostile one is a line."""

import collections
import tracemalloc

from fuzz import checkpoints as hostile

import timesformer_jax as tsf
from timesformer_jax.checkpoints.load import load

MOST_BYTES = 200 << 20  # of memory that Python and numpy take for one of these small files


def test_each_gives_a_one_line_error_and_runs_no_code(tmp_path):
    found = collections.Counter()
    for path, may_succeed in hostile.write_all(tmp_path):
        if "npz" in path or "pickles" in path:  # others are read by libraries that it cannot see
            tracemalloc.start()
        try:
            load(path, needs_head=False)
        except tsf.InputError as error:
            message = str(error)
            assert message.isprintable(), path
            assert path[-40:] in message, message
            assert len(message) < len(path) + 600, message
            found["refused"] += 1
        else:
            assert may_succeed, path
            found["loaded"] += 1
        finally:
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert most < MOST_BYTES, path
        assert not (tmp_path / "code_ran").exists(), path
    assert found["refused"] >= 200


def test_the_unchanged_checkpoint_is_loaded(tmp_path):
    """Otherwise the test above could not fail."""
    assert load(hostile.RELEASE, num_heads=4)[0].model.attention == "space"
