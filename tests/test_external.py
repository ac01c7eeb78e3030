"""Records as DMVR and TFDS write them: they are read as written, or refused in one line."""

import io
import itertools
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from timesformer_jax import recipes
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input import pipeline
from timesformer_jax.data.layout import INDEX_DTYPES
from timesformer_jax.data.records import external, external_index
from timesformer_jax.data.records.open import absolute_source, open_split
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation import multi_view
from timesformer_jax.evaluation.multi_view import evaluate_checkpoint
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.training import loop

# TFDS reads its description with a name that protobuf is to drop.
pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore:label.. is deprecated:DeprecationWarning"),
]

HEIGHT, WIDTH, FPS = 24, 32, 10.0
# At 10 frames a second, four frames one after the other.
SPEC = ClipSpec(frames=4, frame_stride=3, crop=HEIGHT, short_side=HEIGHT)
LABELS = ("jump", "run", "sit")
JPEG_ERROR = 6  # decoders round differently; a square beside it, or the next frame, is far off


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache, so that no test writes to the real one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- writing as others do -----------------------------------------------------------------------


def pictures(seed, count, height=HEIGHT, width=WIDTH):
    """Smooth pictures, unlike each other."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 8, 3), np.uint8)
    resized = [Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC) for c in coarse]
    return np.stack([np.asarray(image) for image in resized])


def encode(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG")
    return file.getvalue()


def decode(frames):
    return np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in frames])


def sequence_example(frames, labels=(0,), texts=(), timestamps=(), **context):
    """A record as DMVR's and Scenic's generators make them; `a__b` stands for the key a/b."""
    record = tf.train.SequenceExample()
    if labels:
        record.context.feature["clip/label/index"].int64_list.value[:] = labels
    if texts:
        values = [text.encode() for text in texts]
        record.context.feature["clip/label/text"].bytes_list.value[:] = values
    for key, value in context.items():
        feature = record.context.feature[key.replace("__", "/")]
        kind = {int: "int64_list", float: "float_list", str: "bytes_list"}[type(value)]
        value = value.encode() if isinstance(value, str) else value
        getattr(feature, kind).value[:] = [value]
    lists = record.feature_lists.feature_list
    for frame in frames:
        lists["image/encoded"].feature.add().bytes_list.value[:] = [frame]
    for timestamp in timestamps:
        lists["image/timestamp"].feature.add().int64_list.value[:] = [timestamp]
    return record.SerializeToString()


def clip(seed=0, count=4, **said):
    """A small record that says its frame rate unless told otherwise."""
    said = {"image__frame_rate": FPS} | said
    return sequence_example([encode(picture) for picture in pictures(seed, count)], **said)


def write(path, serialized):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(os.fspath(path)) as writer:
        for record in serialized:
            writer.write(record)


@pytest.fixture(scope="module")
def dmvr(tmp_path_factory):
    """Tables as Scenic names them: 7 training clips in 2 shards, 3 validation clips in 1."""
    directory = tmp_path_factory.mktemp("dmvr")
    written = {}
    for table, numbers in {"train": range(7), "validation": range(7, 10)}.items():
        serialized = []
        for i in numbers:
            frames = [encode(picture) for picture in pictures(i, 8 + 2 * i)]
            name, label = f"videos/{i}.mp4", i % 3
            written[name] = frames, label
            said = {"labels": [label], "texts": [LABELS[label]], "image__frame_rate": FPS}
            serialized.append(sequence_example(frames, **said, video__filename=name))
        count = 2 if table == "train" else 1
        for shard in range(count):
            name = f"some-{table}.rgb.tfrecord-{shard:05d}-of-{count:05d}"
            write(directory / name, serialized[shard::count])
    (directory / "README.txt").write_text("not a shard")
    return directory, written


class ExternalClips(tfds.core.GeneratorBasedBuilder):
    """A data set of TFDS, with a configuration for each encoding of its frames."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("jpeg", "png")]  # noqa: RUF012

    def _info(self):
        form = self.builder_config.name
        features = {
            "clip": tfds.features.Video(shape=(None, None, None, 3), encoding_format=form),
            "action": tfds.features.ClassLabel(names=LABELS),
            "note": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples(6), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for i in range(count):
            # TFDS's -1 for a label that is not known.
            label = -1 if i == 3 else i % 3
            yield i, {"clip": pictures(i, 8 + 2 * i), "action": label, "note": "x"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder in which TFDS has built both configurations."""
    directory = tmp_path_factory.mktemp("tfds")
    for config in ("jpeg", "png"):
        ExternalClips(config=config, data_dir=directory).download_and_prepare()
    return directory


# ---- frames -------------------------------------------------------------------------------------


def middle(video):
    """The four frames of the middle clip, at FPS."""
    start = (len(video) - 4) // 2
    return video[start : start + 4]


def assert_evaluation_shows(split, videos, tolerance):
    """Every record's middle clip from three squares. videos: arrays of frames, by record."""
    assert len(split) == len(videos)
    for batch in pipeline.eval_batches(split, SPEC, batch_size=2, crops=3):
        for row in np.flatnonzero(batch["valid"]):
            record = batch["record"][row]
            assert batch["label"][row] == split.label[record]
            for crop, left in enumerate([0, 4, 8]):
                expected = middle(videos[record])[:, :, left : left + HEIGHT].astype(int)
                assert np.abs(batch["frames"][row, crop] - expected).max() <= tolerance


def assert_training_shows(split, videos, tolerance):
    """Every training clip is four frames in a row, of one square of its record."""
    options = {"batch_size": 2, "short_side_range": (HEIGHT, HEIGHT), "flip": False, "seed": 1}
    for batch, _ in itertools.islice(pipeline.train_batches(split, SPEC, **options), 2):
        for clip, record in zip(batch["frames"], batch["record"]):
            video = videos[record].astype(int)
            squares = (
                video[start : start + 4, :, left : left + HEIGHT]
                for start in range(len(video) - 3)
                for left in range(WIDTH - HEIGHT + 1)
            )
            # Decoding a part of a JPEG interpolates its chroma at the seam otherwise.
            within = (np.s_[:], np.s_[:], np.s_[2:-2])
            assert min(np.abs(clip[within] - s[within]).max() for s in squares) <= tolerance


def test_tables_of_sequence_examples_show_what_was_written(dmvr):
    directory, written = dmvr
    for name, count in {"train": 7, "validation": 3}.items():
        split = open_split(directory, name)
        assert len(split) == count
        assert split.label_names == LABELS
        assert [written[i][1] for i in split.ids] == split.label.tolist()
        assert (split.fps == FPS).all()
        assert (split.height == HEIGHT).all()
        assert (split.width == WIDTH).all()
        videos = [decode(written[i][0]) for i in split.ids]
        assert split.num_frames.tolist() == [len(video) for video in videos]
        assert_evaluation_shows(split, videos, tolerance=JPEG_ERROR)
        assert_training_shows(split, videos, tolerance=JPEG_ERROR)


@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_a_tfds_data_set_shows_what_tfds_does(data_dir, form, caplog):
    builder = tfds.builder_from_directory(data_dir / "external_clips" / form / "1.2.0")
    examples = list(tfds.as_numpy(builder.as_dataset(split="train")))
    used = [example for example in examples if example["action"] >= 0]
    with caplog.at_level(logging.WARNING):
        split = open_split(f"tfds:external_clips/{form}:1.2.0@{data_dir}", "train", fps=FPS)
    assert "left out of 6 records: 1 with no label (first: " in caplog.text
    assert split.label_names == LABELS
    assert split.label.tolist() == [example["action"] for example in used]
    videos = [example["clip"] for example in used]
    if form == "png":  # what was written, exactly
        assert all(np.array_equal(v, pictures((len(v) - 8) // 2, len(v))) for v in videos)
    assert_evaluation_shows(split, videos, tolerance=0)
    assert_training_shows(split, videos, tolerance=0 if form == "png" else JPEG_ERROR)

    by_folder = open_split(builder.data_path, "train", fps=FPS)
    for name in ("files", "label_names", "ids", *INDEX_DTYPES):
        assert np.array_equal(getattr(split, name), getattr(by_folder, name)), name


def test_records_of_two_sizes_give_one_line_errors(tmp_path):
    small = [encode(picture) for picture in pictures(1, 4, height=20)]
    write(tmp_path / "train.tfrecord", [clip(0), sequence_example(small, image__frame_rate=FPS)])
    split = open_split(tmp_path, "train")
    with pytest.raises(InputError, match="short side 20 to 24; make it again from the videos"):
        next(pipeline.eval_batches(split, SPEC, batch_size=1))


# ---- frame rates --------------------------------------------------------------------------------


def test_the_frame_rate_is_what_a_record_says_before_what_is_told(tmp_path):
    times = [40_000 * i for i in range(4)]
    frames = [encode(picture) for picture in pictures(0, 4)]
    serialized = [
        clip(0, image__frame_rate=15.0, timestamps=times),
        clip(1, image__frame_rate=15),  # as an integer
        sequence_example(frames, timestamps=times),
        sequence_example(frames, timestamps=times, image__frame_rate=0.0),
        sequence_example(frames, clip__start__timestamp=0, clip__end__timestamp=500_000),
        sequence_example(frames, timestamps=[0, 0, 0, 0]),
        sequence_example(frames),
    ]
    write(tmp_path / "train.tfrecord", serialized)
    assert open_split(tmp_path, "train", fps=8).fps.tolist() == [15, 15, 25, 25, 8, 8, 8]
    with pytest.raises(InputError, match="3 of 7 records of 'train' do not state their frame"):
        open_split(tmp_path, "train")
    for impossible in (-1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="must be above 0"):
            open_split(tmp_path, "train", fps=impossible)


def test_training_and_evaluation_are_told_the_frame_rate(tmp_path, monkeypatch):
    """Seen by how far they come: with it, to labels that do not fit the model."""
    for name in ("train", "validation"):
        write(tmp_path / f"{name}.tfrecord", [clip(0, image__frame_rate=0.0)] * 8)
    config = recipes.demo()
    config.data.update(directory=os.fspath(tmp_path), demo="")
    config.model.num_classes = 5
    with pytest.raises(InputError, match="do not state their frame rate"):
        loop.train(config, os.fspath(tmp_path / "run"))
    config.data.fps = 10.0
    with pytest.raises(InputError, match="has 1 labels, the config's model 5"):
        loop.train(config, os.fspath(tmp_path / "run"))

    metadata = CheckpointMetadata(
        TimeSformerConfig(num_classes=5), SPEC, tuple("abcde"), config.to_dict()
    )
    monkeypatch.setattr(multi_view, "load", lambda *_, **__: (metadata, {}))
    with pytest.raises(InputError, match="has 1 labels"):
        evaluate_checkpoint("run")
    with pytest.raises(InputError, match="do not state their frame rate"):
        evaluate_checkpoint("run", data=os.fspath(tmp_path))
    with pytest.raises(InputError, match="has 1 labels"):
        evaluate_checkpoint("run", data=os.fspath(tmp_path), fps=10.0)


@given(
    rate=st.floats(1, 120),
    seconds=st.lists(st.floats(1, 60), min_size=1, max_size=20),
    rounding=st.sampled_from([np.floor, np.rint, np.ceil]),
)
def test_clips_as_long_as_they_say_tell_the_frame_rate(rate, seconds, rounding):
    seconds = np.array(seconds)
    frames = rounding(rate * seconds).astype(np.int32)
    unsaid = np.full(len(seconds), np.nan, np.float32)
    index = {"fps": unsaid, "num_frames": frames, "seconds": seconds}
    found = external.frame_rates("train", index, None)
    assert len(set(found.tolist())) == 1
    assert abs(found[0] - rate) <= 1 / seconds.mean() + 1e-4 * rate


def test_clips_shorter_than_they_say_tell_no_frame_rate(tmp_path):
    """DMVR's HMDB-51 example says 20 seconds of every clip."""
    said = {"clip__start__timestamp": 0, "clip__end__timestamp": 20_000_000}
    frames = [encode(picture) for picture in pictures(0, 9)]
    write(tmp_path / "train", [])
    serialized = [sequence_example(frames[:n], **said) for n in (4, 9)]
    write(tmp_path / "train_1-00000-of-00001", serialized)
    with pytest.raises(InputError, match="2 of 2 records of 'train_1' do not state"):
        open_split(tmp_path, "train_1")
    assert open_split(tmp_path, "train_1", fps=10).fps.tolist() == [10, 10]


# ---- labels -------------------------------------------------------------------------------------


def tables(directory, **pairs):
    """Tables of records with these (label, text)."""
    for table, members in pairs.items():
        serialized = [
            clip(i, labels=[label], texts=[text] if text else [])
            for i, (label, text) in enumerate(members)
        ]
        write(directory / f"{table}-00000-of-00001", serialized)


def test_label_names_are_those_of_all_tables(tmp_path):
    tables(tmp_path, train=[(4, "e"), (0, "a"), (4, "")], test=[(1, "b"), (0, "a")])
    train, test = open_split(tmp_path, "train"), open_split(tmp_path, "test")
    assert train.label_names == test.label_names == ("a", "b", "2", "3", "e")
    assert train.label.tolist() == [4, 0, 4]
    assert test.label.tolist() == [1, 0]


def test_labels_without_texts_are_named_by_number(tmp_path):
    tables(tmp_path, train=[(1, "")], test=[(3, "")])
    assert open_split(tmp_path, "train").label_names == ("0", "1", "2", "3")


def test_tables_numbered_differently_go_by_text(tmp_path, caplog):
    """DMVR's generator numbers each csv's labels by itself."""
    tables(tmp_path, train=[(0, "sit"), (1, "run"), (2, "jump")], test=[(0, "run"), (1, "sit")])
    with caplog.at_level(logging.WARNING):
        train, test = open_split(tmp_path, "train"), open_split(tmp_path, "test")
    assert "number their labels differently" in caplog.text
    assert train.label_names == test.label_names == LABELS
    assert train.label.tolist() == [2, 1, 0]
    assert test.label.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ([(0, "a"), (0, "b")], [(0, "a")], "label 0 of train of .* is both 'a' and 'b'"),
        ([(0, "a"), (1, "a")], [(0, "a")], "'a' of train of .* is both label 0 and 1"),
        ([(0, "a"), (1, "b")], [(0, "b"), (2, "")], "label 2 of test has no clip/label/text"),
    ],
)
def test_contradictory_labels_give_one_line_errors(tmp_path, train, test, said):
    tables(tmp_path, train=train, test=test)
    with pytest.raises(InputError, match=said):
        open_split(tmp_path, "train")


# ---- records that cannot be used ----------------------------------------------------------------


def test_what_is_left_out_is_counted_and_named(tmp_path, caplog):
    frames = [encode(picture) for picture in pictures(0, 4)]
    small = encode(pictures(0, 1, height=20)[0])
    serialized = [
        sequence_example([], video__filename="empty"),
        clip(1, labels=[], video__filename="unlabelled"),
        clip(2, labels=[-1]),
        clip(3, labels=[1 << 40]),
        clip(4, labels=[0, 2], video__filename="two"),
        clip(5, labels=[2, 2], video__filename="good"),
        sequence_example([*frames, small], video__filename="sizes"),
        sequence_example([*frames, frames[0][:20]], video__filename="cut"),
        sequence_example([*frames, b"GIF89a"], video__filename="gif"),
    ]
    write(tmp_path / "train.tfrecord", serialized)
    for _ in range(2):  # when the index is made, and when it is read
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            split = open_split(tmp_path, "train")
        assert split.ids.tolist() == ["good"]
        assert split.label.tolist() == [2]
        assert "train: left out of 9 records: " in caplog.text
        for why in (
            "1 with no frames (first: empty)",
            "3 with no label (first: unlabelled)",
            "1 with several labels (first: two)",
            "1 with frames of several sizes (first: sizes)",
            "2 with frames that are neither JPEG nor PNG (first: cut)",
        ):
            assert why in caplog.text


def test_a_table_of_which_nothing_can_be_used_gives_a_one_line_error(tmp_path, dmvr):
    write(tmp_path / "empty.tfrecord", [])
    write(tmp_path / "other.tfrecord", [tf.train.Example().SerializeToString()])
    write(tmp_path / "train.tfrecord", [clip()])
    assert len(open_split(tmp_path, "train")) == 1
    with pytest.raises(InputError, match=r"'other' has no record .* no frames \(first: other"):
        open_split(tmp_path, "other")
    with pytest.raises(InputError, match="'empty' has no record that can be used: empty"):
        open_split(tmp_path, "empty")


@pytest.mark.parametrize("damage", ["cut", "flipped", "compressed", "not proto"])
def test_a_damaged_shard_gives_a_one_line_error(tmp_path, damage):
    path = tmp_path / "train.tfrecord"
    write(path, [clip(0), clip(1)])
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "flipped":
        content[100] ^= 1
        path.write_bytes(content)
    elif damage == "compressed":
        with tf.io.TFRecordWriter(os.fspath(path), "GZIP") as writer:
            writer.write(clip(0))
    else:
        write(path, [b"\xff" * 50])
    with pytest.raises(InputError, match=r"train.tfrecord cannot be read .* from byte") as error:
        open_split(tmp_path, "train")
    assert "\n" not in str(error.value)


# ---- the index ----------------------------------------------------------------------------------


def test_an_index_is_kept_beside_the_data_and_serves_until_the_data_changes(tmp_path):
    path, index = tmp_path / "train.tfrecord", tmp_path / "train.records.npz"
    write(path, [clip(0), clip(1)])
    first = open_split(tmp_path, "train")
    assert sorted(os.listdir(tmp_path)) == ["train.records.npz", "train.tfrecord"]
    # Nothing is read again: there is nothing left to read.
    whole = path.read_bytes()
    path.write_bytes(b"\0" * len(whole))
    again = open_split(tmp_path, "train")
    assert np.array_equal(first.offset, again.offset)
    path.write_bytes(whole)
    for damaged in (b"", b"PK\x03\x04", index.read_bytes()[:200]):
        index.write_bytes(damaged)
        assert np.array_equal(open_split(tmp_path, "train").offset, first.offset)
    write(path, [clip(0), clip(1), clip(2)])
    assert len(open_split(tmp_path, "train")) == 3
    write(tmp_path / "test.tfrecord", [clip(0, labels=[4])])
    assert len(open_split(tmp_path, "train").label_names) == 5


def test_where_the_data_cannot_be_written_the_index_is_in_the_cache(tmp_path, cache, caplog):
    path = tmp_path / "data" / "train.tfrecord"
    write(path, [clip(0), clip(1)])
    # In the way of the index, for any user: root may write to a folder that is read-only.
    (tmp_path / "data" / "train.records.npz").mkdir()
    with caplog.at_level(logging.INFO):
        open_split(tmp_path / "data", "train")
    (kept,) = cache.glob("timesformer_jax/*/train.records.npz")
    assert f"the index of train is kept at {kept}" in caplog.text
    assert sorted(os.listdir(tmp_path / "data")) == ["train.records.npz", "train.tfrecord"]
    path.write_bytes(b"\0" * path.stat().st_size)
    assert len(open_split(tmp_path / "data", "train")) == 2


def test_an_index_that_cannot_be_saved_is_used_with_a_warning(tmp_path, cache, caplog):
    write(tmp_path / "data" / "train.tfrecord", [clip(0)])
    (tmp_path / "data" / "train.records.npz").mkdir()
    cache.write_text("a file where the folder should be")
    assert len(open_split(tmp_path / "data", "train")) == 1
    assert caplog.text.count("cannot keep the index of train") == 2


def test_processes_make_the_same_index(dmvr):
    directory, _ = dmvr
    files = sorted(map(str, directory.glob("some-train*-of-00002")))
    sizes = [os.path.getsize(file) for file in files]
    record_format = external_index.SequenceExampleFormat()
    alone = external_index.make_index("train", files, sizes, record_format, workers=1)
    together = external_index.make_index("train", files, sizes, record_format, workers=2)
    assert alone.keys() == together.keys()
    for column in alone:
        np.testing.assert_array_equal(alone[column], together[column])


def test_records_on_gs_are_read_and_indexed_there(gcs, dmvr):
    directory, _ = dmvr
    bucket = gcs.root / "bucket" / "data"
    bucket.mkdir()
    for shard in directory.glob("some-*-of-*"):
        (bucket / shard.name).write_bytes(shard.read_bytes())
    code = f"""
import json
from timesformer_jax.data.input import pipeline
from timesformer_jax.data.records.open import open_split
from timesformer_jax.clip_spec import ClipSpec
split = open_split("gs://bucket/data", "train")
spec = ClipSpec(frames=4, frame_stride=3, crop={HEIGHT}, short_side={HEIGHT})
batch = next(pipeline.eval_batches(split, spec, batch_size=1))
print(json.dumps([split.files, split.offset.tolist(), int(batch["frames"].sum())]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | gcs.environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    files, offset, total = json.loads(done.stdout)
    here = open_split(directory, "train")
    batch = next(pipeline.eval_batches(here, SPEC, batch_size=1))
    assert files == [f"gs://bucket/data/{os.path.basename(file)}" for file in here.files]
    assert offset == here.offset.tolist()
    assert total == batch["frames"].sum()
    assert (bucket / "some-train.rgb.records.npz").is_file()


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "split", "table"),
    [
        (["train-00000-of-00001", "test-00000-of-00001"], "train", "train"),
        (["train.tfrecord-00000-of-00001", "train_2.tfrecord"], "train", "train"),
        (["k400-train-00000-of-00001.tfrecord", "k400-val.tfrecords"], "val", "k400-val"),
        (["hmdb_train_1-00000-of-00001", "hmdb_test_1-00000-of-00001"], "test", "hmdb_test_1"),
        (["train/clips-00000-of-00001", "val/clips-00000-of-00001"], "val", "val/clips"),
    ],
)
def test_a_split_is_a_table_by_its_name_or_a_word_of_it(tmp_path, files, split, table):
    for file in files:
        write(tmp_path / file, [clip()])
    found = open_split(tmp_path, split)
    assert found.name == table
    (file,) = found.files
    assert os.path.relpath(file, tmp_path).startswith(table)


def test_splits_that_cannot_be_found_give_one_line_errors(tmp_path):
    with pytest.raises(InputError, match=r"not a prepared data set .* no shards"):
        open_split(tmp_path, "train")
    for table in ("train_1", "train_2"):
        write(tmp_path / f"{table}-00000-of-00001", [clip()])
    with pytest.raises(InputError, match="several splits 'train'; there: train_1, train_2"):
        open_split(tmp_path, "train")
    with pytest.raises(InputError, match="no split 'rain'; there: train_1, train_2"):
        open_split(tmp_path, "rain")
    write(tmp_path / "test-00001-of-00003", [clip()])
    with pytest.raises(InputError, match=r"lacks 2 of the 3 shards of 'test' \(first: 00000"):
        open_split(tmp_path, "train_1")
    write(tmp_path / "test-00000-of-00001", [clip()])
    with pytest.raises(InputError, match=r"has the table 'test' twice \(test-00000-of-00001, "):
        open_split(tmp_path, "train_1")
    os.remove(tmp_path / "test-00001-of-00003")
    assert len(open_split(tmp_path, "train_1")) == 1
    write(tmp_path / "test.tfrecord", [clip()])
    with pytest.raises(InputError, match=r"has the table 'test' twice \(test-00000-of-00001, test"):
        open_split(tmp_path, "train_1")


def test_tfds_data_sets_that_cannot_be_opened_give_one_line_errors(data_dir, tmp_path):
    with pytest.raises(InputError, match=r"no TFDS data set .* `tfds build ucf10 --data_dir"):
        open_split(f"tfds:ucf10@{data_dir}", "train")
    with pytest.raises(InputError, match=r"no split 'validation'; there: .*train"):
        open_split(f"tfds:external_clips/png@{data_dir}", "validation")
    with pytest.raises(InputError, match="3 of 3 records of 'test' do not state their frame rate"):
        open_split(f"tfds:external_clips/png@{data_dir}", "test")
    source = data_dir / "external_clips" / "png" / "1.2.0"
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(InputError, match=f"TFDS cannot open {tmp_path}"):
        open_split(tmp_path, "train")
    info = json.loads((source / "dataset_info.json").read_text())
    (tmp_path / "features.json").write_bytes((source / "features.json").read_bytes())
    (tmp_path / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "array_record"}))
    with pytest.raises(InputError, match="stored as array_record, and only tfrecord can be read"):
        open_split(tmp_path, "train")
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=f"cannot read {tmp_path}: .*train.tfrecord-00000"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ({"label": tfds.features.ClassLabel(num_classes=2)}, "0 videos and 1 class labels"),
        (
            {"a": tfds.features.Video(), "b": tfds.features.Video()},
            "2 videos and 0 class labels among its features .a, b",
        ),
    ],
)
def test_features_without_one_video_and_one_label_give_one_line_errors(features, said):
    with pytest.raises(InputError, match=said):
        external.tfds_format(tfds.features.FeaturesDict(features), "here")


def test_sources_are_the_same_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_source("data") == str(tmp_path / "data")
    assert absolute_source("gs://bucket/data") == "gs://bucket/data"
    assert absolute_source("tfds:ucf101/ucf101_1:2.0.0") == "tfds:ucf101/ucf101_1:2.0.0"
    assert absolute_source("tfds:ucf101@sets") == f"tfds:ucf101@{tmp_path / 'sets'}"
