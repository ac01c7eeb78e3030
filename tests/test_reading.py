"""Records at their offsets and the frames in them, against TensorFlow's reader and parser."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import environment
from hypothesis import given
from hypothesis import strategies as st

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input import pipeline, reading
from timesformer_jax.data.records import prepared, wire
from timesformer_jax.data.records.open import open_split
from timesformer_jax.data.records.wire import RECORD_OVERHEAD_BYTES
from timesformer_jax.errors import InputError

SPEC = ClipSpec(frames=4, frame_stride=2, crop=32, short_side=40)
OPTIONS = {"batch_size": 4, "short_side_range": (32, 40), "flip": False, "seed": 0}


# ---- finding byte strings -----------------------------------------------------------------------

# Their lengths take one, two and three bytes to say.
values = st.one_of(
    st.binary(max_size=3),
    st.integers(0, 40000).map(lambda n: b"\x0a" * n),
)
others = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5).map(
        lambda v: tf.train.Feature(int64_list=tf.train.Int64List(value=v))
    ),
    st.lists(st.floats(width=32), max_size=5).map(
        lambda v: tf.train.Feature(float_list=tf.train.FloatList(value=v))
    ),
    st.binary(max_size=200).map(
        lambda v: tf.train.Feature(bytes_list=tf.train.BytesList(value=[v]))
    ),
)
names = st.text(max_size=8).filter(lambda name: name != "video")


@given(st.lists(values, max_size=12), st.dictionaries(names, others, max_size=4))
def test_byte_strings_are_found_where_the_parser_finds_them(frames, features):
    video = tf.train.Feature(bytes_list=tf.train.BytesList(value=frames))
    example = tf.train.Example(features=tf.train.Features(feature={"video": video, **features}))
    serialized = example.SerializeToString()
    places = wire.bytes_list(serialized, "video")
    assert [serialized[place] for place in places] == frames
    with pytest.raises(KeyError, match="vide"):
        wire.bytes_list(serialized, "vide" + "x" * 9)


fields = st.one_of(
    st.text(max_size=200),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(width=32, allow_nan=False),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4).map(tuple),
    st.lists(values, max_size=4),
)


# Of one length: protobuf puts a name behind those that begin with it.
@given(st.dictionaries(st.text(min_size=3, max_size=3), fields, max_size=6))
def test_an_example_has_the_bytes_of_protobuf(example):
    features = {}
    for name, value in example.items():
        value = value if isinstance(value, (list, tuple)) else [value]
        value = [each.encode() if isinstance(each, str) else each for each in value]
        if isinstance(example[name], float):
            features[name] = tf.train.Feature(float_list=tf.train.FloatList(value=value))
        elif isinstance(example[name], (int, tuple)):
            features[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=value))
        else:
            features[name] = tf.train.Feature(bytes_list=tf.train.BytesList(value=value))
    expected = tf.train.Example(features=tf.train.Features(feature=features))
    assert wire.serialize(example) == expected.SerializeToString(deterministic=True)


@pytest.mark.parametrize("label", [1, (), (1,), (2, 0)])
def test_what_is_prepared_are_the_records_of_tfds(label):
    """TFDS, which opens prepared directories, would write the same bytes."""
    definition = prepared.features(["a", "b", "c"], multilabel=isinstance(label, tuple))
    example = {
        "video": [b"jpeg" * 100, b"", b"another"], "label": label, "id": "kurz/ü.mp4#0.2-0.5",
        "fps": 29.97, "stride": 4, "num_frames": 300,
    }  # fmt: skip
    expected = tf.train.Example.FromString(definition.serialize_example(example))
    assert wire.serialize(example) == expected.SerializeToString(deterministic=True)


# ---- records ------------------------------------------------------------------------------------


def test_files_are_those_of_tensorflows_writer(tmp_path):
    records = [b"", b"a", bytes(range(256)) * 300]
    with tf.io.TFRecordWriter(str(tmp_path / "theirs")) as theirs:
        for record in records:
            theirs.write(record)
    with wire.ShardWriter(tmp_path / "ours") as ours:
        places = [ours.write(record) for record in records]
    written = (tmp_path / "ours").read_bytes()
    assert written == (tmp_path / "theirs").read_bytes()
    for place, record in zip(places, records, strict=True):
        first = place["offset"] + wire.RECORD_HEADER_BYTES
        assert written[first : first + place["size"]] == record


@pytest.fixture(scope="module")
def split(demo_data):
    return open_split(demo_data, "train")


def test_records_are_those_that_tensorflow_reads(split):
    for shard, file in enumerate(split.files):
        rows = np.flatnonzero(split.shard == shard)
        for row, expected in zip(rows, tf.data.TFRecordDataset(file).as_numpy_iterator()):
            found = reading.read_record(file, int(split.offset[row]), int(split.size[row]))
            assert found == expected


@given(st.data())
def test_a_flipped_bit_or_a_cut_anywhere_gives_a_one_line_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("shard")
    path = folder / "some.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(b"before")
        writer.write(b"record")
    offset, size = 6 + RECORD_OVERHEAD_BYTES, 6
    assert reading.read_record(str(path), offset, size) == b"record"
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(offset, len(whole) - 1))
    if data.draw(st.booleans()):
        whole[at] ^= 1 << data.draw(st.integers(0, 7))
        said = f"some.tfrecord is damaged in the record at byte {offset}; `timesformer check "
    else:
        del whole[at:]
        said = f"some.tfrecord ends within the record at byte {offset}; `timesformer check "
    path.write_bytes(whole)
    for read in (reading.read_record, reading.open_record):
        with pytest.raises(InputError) as error:
            read(str(path), offset, size)
        assert said in str(error.value)
        assert str(folder) in str(error.value)


@given(
    st.lists(values, min_size=1, max_size=12),
    st.integers(1, 50),
    st.lists(st.integers(0, 11), max_size=12),
)
def test_a_record_that_stays_in_its_file_has_the_same_bytes(frames, block, indices):
    serialized = wire.serialize({"video": frames, "id": "a", "label": 300})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "BLOCK_BYTES", block)
        record = wire.LongRecord(len(serialized), lambda first, last: serialized[first:last])
        indices = [i % len(frames) for i in indices]
        assert wire.extract_frames(record, indices) == [frames[i] for i in indices]
        assert record.checksum() == wire.masked_crc32c(serialized)
        assert record[:] == serialized


def test_long_records_give_the_same_batches_and_are_opened_once(split, monkeypatch):
    split = dataclasses.replace(split, places=())
    short = every_batch(split, views="cover")
    assert len(short) > 32
    opened, open_record = [], reading.open_record
    monkeypatch.setattr(reading, "LONG_RECORD_BYTES", 0)
    monkeypatch.setattr(reading, "open_record", lambda *p: opened.append(p) or open_record(*p))
    long = every_batch(split, views="cover")
    assert all((a["frames"] == b["frames"]).all() for a, b in zip(short, long, strict=True))
    assert len(opened) == len(split)


@pytest.fixture
def copied(split, tmp_path):
    """The split with its first record in a file of its own, without places, and that file."""
    path = tmp_path / "copy.tfrecord"
    row = 0
    record = reading.read_record(
        split.files[split.shard[row]], int(split.offset[row]), int(split.size[row])
    )
    offset, shard = split.offset.copy(), split.shard.copy()
    offset[row], shard[row] = 0, len(split.files)

    def write(record):
        with tf.io.TFRecordWriter(str(path)) as writer:
            writer.write(record)
        size = split.size.copy()
        size[row] = len(record)
        return dataclasses.replace(
            split, files=(*split.files, str(path)), offset=offset, shard=shard, size=size, places=()
        )

    return path, record, write


def every_batch(split, **options):
    return list(pipeline.eval_batches(split, SPEC, batch_size=4, **options))


@pytest.mark.parametrize("long", [1 << 30, 0])
def test_a_damaged_shard_ends_training_and_evaluation_in_one_line(copied, monkeypatch, long):
    monkeypatch.setattr(reading, "LONG_RECORD_BYTES", long)
    path, record, write = copied
    changed = write(record)
    assert len(every_batch(changed)) == 16
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"copy.tfrecord ends within the record at byte 0"):
        every_batch(changed)
    with pytest.raises(InputError, match=r"copy.tfrecord ends within the record at byte 0"):
        for _ in pipeline.train_batches(changed, SPEC, **OPTIONS):
            pass
    path.unlink()
    with pytest.raises(InputError, match=r"copy.tfrecord: No such file or directory; `timesfor"):
        every_batch(changed)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda jpeg: b"\xff\xd8\xff" + bytes(len(jpeg) - 3), "cannot be decoded"),
        (lambda jpeg: tf.io.encode_jpeg(np.zeros((8, 9, 3), np.uint8)).numpy(), "is 9x8, and not"),
    ],
)
def test_a_frame_that_is_no_image_of_its_size_gives_a_one_line_error(split, copied, spoil, said):
    _, record, write = copied
    example = tf.train.Example.FromString(record)
    frames = example.features.feature["video"].bytes_list
    spoilt = [spoil(frame) for frame in frames.value]
    del frames.value[:]
    frames.value.extend(spoilt)
    with pytest.raises(InputError) as error:
        every_batch(write(example.SerializeToString()))
    assert f"a frame of {split.ids[0]} in " in str(error.value)
    assert f"copy.tfrecord {said}" in str(error.value)


# ---- decoding -----------------------------------------------------------------------------------


def test_a_square_is_the_same_from_whatever_column_it_is_decoded():
    rng = np.random.default_rng(0)
    picture = tf.image.resize(rng.integers(0, 256, (12, 16, 3)), (60, 90), method="bicubic")
    jpeg = tf.io.encode_jpeg(tf.cast(tf.clip_by_value(picture, 0, 255), tf.uint8))
    for left in range(0, 51):
        for top in (0, 7, 21):
            corners = tf.constant([[top, left]])
            found = reading.decode_squares(tf.fill([1, 2], jpeg), corners, side=39)
            expected = tf.io.decode_and_crop_jpeg(jpeg, [top, left, 39, 39], channels=3)
            assert found.shape == (1, 2, 39, 39, 3)
            assert (found.numpy() == expected.numpy()).all()


def test_the_interpreter_ends_while_batches_are_made_ahead(demo_data):
    """TensorFlow's threads asking an ended interpreter for more would wait for ever."""
    code = f"""
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input import pipeline
from timesformer_jax.data.records.open import open_split
split = open_split({str(demo_data)!r}, "train")
spec = ClipSpec(frames=4, frame_stride=2, crop=32, short_side=40)
batches = pipeline.train_batches(split, spec, **{OPTIONS})
print(next(batches)[0]["frames"].shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=environment(), timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(4, 4, 40, 40, 3)\n"
    assert "Traceback" not in done.stderr
