"""Operations on gs:// give the same results as on disk, in a process that uses the fake server."""

import contextlib
import http.client
import itertools
import multiprocessing
import shutil
import ssl
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from gcs import PAGE, serve
from videos import numbers, write_video

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("gcs")) as running:
        yield running


@pytest.fixture(scope="module")
def elsewhere(storage):
    """Calls a function in another process, one for the module: it imports TensorFlow."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in storage.environment.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
            yield lambda function, *arguments: processes.submit(function, *arguments).result()


def files(folder):
    """{path: content}, without the objects that mark folders."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".folder"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def use_gfile(folder):
    import tensorflow as tf

    gfile, seen = tf.io.gfile, []

    def see(names):
        seen.append(sorted(name.removeprefix(folder).rstrip("/") for name in names))

    gfile.makedirs(f"{folder}/deep/down")
    gfile.mkdir(f"{folder}/empty")
    for name in ("a b.txt", "deep/ü+%2F&?.txt", "deep/down/c.bin", "deep/down/nothing", "gone"):
        with gfile.GFile(f"{folder}/{name}", "wb") as file:
            file.write(b"" if name == "deep/down/nothing" else name.encode() * 1000)
    with gfile.GFile(f"{folder}/a b.txt", "ab") as file:
        file.write(b"more")
    gfile.copy(f"{folder}/deep/down/c.bin", f"{folder}/copied")
    gfile.rename(f"{folder}/copied", f"{folder}/a b.txt", overwrite=True)
    gfile.rename(f"{folder}/deep/down", f"{folder}/moved")
    gfile.remove(f"{folder}/gone")
    see(gfile.listdir(folder))
    see(gfile.listdir(f"{folder}/deep"))
    see(gfile.glob(f"{folder}/*.txt"))
    see(gfile.glob(f"{folder}/*/?.bin"))
    for name in ("", "/moved", "/empty", "/a b.txt", "/moved/nothing", "/gone", "/mov"):
        seen.append((name, gfile.exists(folder + name), gfile.isdir(folder + name)))
    seen.append(gfile.stat(f"{folder}/moved/c.bin").length)
    with gfile.GFile(f"{folder}/moved/c.bin", "rb") as file:
        seen.append((file.size(), file.read(20)))
        file.seek(14_990)
        seen.append((file.tell(), file.read(), file.read()))
    for fails in (
        lambda: gfile.GFile(f"{folder}/gone").read(),
        lambda: gfile.remove(f"{folder}/gone"),
        lambda: gfile.copy(f"{folder}/moved/c.bin", f"{folder}/a b.txt"),
        lambda: gfile.rename(f"{folder}/moved/c.bin", f"{folder}/a b.txt"),
    ):
        try:
            fails()
        except tf.errors.OpError as error:
            seen.append(type(error).__name__)
    gfile.rmtree(f"{folder}/deep")
    seen.append(gfile.exists(f"{folder}/deep"))
    return seen


def use_epath(folder):
    from etils import epath

    folder, seen = epath.Path(folder), []

    def see(paths):
        seen.append(sorted(str(path.relative_to(folder)) for path in paths))

    (folder / "deep" / "down").mkdir(parents=True)
    (folder / "deep" / "down" / "one.txt").write_text("één\n")
    (folder / "deep" / "two.bin").write_bytes(bytes(range(256)))
    (folder / "deep" / "two.bin").copy(folder / "three.bin")
    (folder / "three.bin").rename(folder / "four.bin")
    (folder / "deep" / "two.bin").unlink()
    see(folder.iterdir())
    see(folder.glob("deep/*/*.txt"))
    see(folder.glob("*.bin"))
    seen.append((folder / "deep" / "down" / "one.txt").read_text())
    seen.append((folder / "four.bin").stat().length)
    for path in (folder / "deep", folder / "four.bin", folder / "three.bin"):
        seen.append((path.exists(), path.is_dir(), path.is_file()))
    for fails in (
        lambda: (folder / "three.bin").read_bytes(),
        lambda: (folder / "three.bin").unlink(),
        lambda: (folder / "deep").mkdir(),
    ):
        try:
            fails()
        except OSError as error:
            seen.append(type(error).__name__)
    (folder / "deep").rmtree()
    see(folder.iterdir())
    return seen


@pytest.mark.parametrize("use", [use_gfile, use_epath])
def test_files_behave_as_on_disk(elsewhere, storage, tmp_path, use):
    name = use.__name__
    there = elsewhere(use, f"gs://bucket/{name}")
    here = elsewhere(use, str(tmp_path / name))
    assert there == here
    assert files(storage.root / "bucket" / name) == files(tmp_path / name) != {}


def listing(folder):
    import tensorflow as tf

    return sorted(tf.io.gfile.listdir(folder)), len(tf.io.gfile.glob(f"{folder}/*/*"))


def test_a_listing_of_several_pages(elsewhere, storage):
    folder = storage.root / "bucket" / "many"
    names = [f"{i}.txt" for i in range(PAGE // 2)] + [f"{i}/x" for i in range(PAGE // 2 + 7)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    listed, deeper = elsewhere(listing, "gs://bucket/many")
    assert listed == sorted({name.removesuffix("x") for name in names})
    assert deeper == PAGE // 2 + 7


def write_records(path):
    """Returns what stands at the offsets of some of the records that it writes."""
    import tensorflow as tf

    records = [bytes([i % 256]) * (i * 37 % 5000) for i in range(300)]
    offsets = itertools.accumulate((len(record) + 16 for record in records), initial=0)
    with tf.io.TFRecordWriter(path) as writer:
        for record in records:
            writer.write(record)
    for record, offset in list(zip(records, offsets))[::60]:
        variant = tf.raw_ops.TFRecordDatasetV2(
            filenames=[path], compression_type="", buffer_size=1000, byte_offsets=[offset]
        )
        found = tf.data.experimental.from_variant(variant, tf.TensorSpec((), tf.string))
        assert found.take(1).get_single_element() == record


def test_records_are_written_and_found_by_offset(elsewhere, storage, tmp_path):
    elsewhere(write_records, "gs://bucket/records")
    elsewhere(write_records, str(tmp_path / "records"))
    assert files(storage.root / "bucket")["records"] == (tmp_path / "records").read_bytes()


def train_batches(directory):
    from timesformer_jax.clip_spec import ClipSpec
    from timesformer_jax.data.input import pipeline
    from timesformer_jax.data.records.open import open_split

    split = open_split(directory, "train")
    spec = ClipSpec(frames=4, frame_stride=2, crop=32, short_side=40)
    options = {"batch_size": 8, "short_side_range": (32, 40), "flip": True, "seed": 3}
    batches = pipeline.train_batches(split, spec, **options)
    return split.label_names, [batch for batch, _ in itertools.islice(batches, 3)]


def test_batches_come_from_a_prepared_directory_there(elsewhere, storage, demo_data):
    shutil.copytree(demo_data, storage.root / "bucket" / "prepared")
    labels, batches = elsewhere(train_batches, "gs://bucket/prepared")
    expected_labels, expected = elsewhere(train_batches, str(demo_data))
    assert labels == expected_labels
    assert len(batches) == len(expected) == 3
    for batch, other in zip(batches, expected):
        assert batch.keys() == other.keys()
        assert all(np.array_equal(batch[key], other[key]) for key in batch)


def read_frames(directory, rows, indices):
    """The frames of some records, and the number of bytes that were read."""
    from timesformer_jax.data.records import access
    from timesformer_jax.data.records.open import open_split

    split = open_split(directory, "train")
    return [access.read_frames(split, row, indices) for row in rows]


def test_a_clip_reads_its_frames_alone_there(elsewhere, storage, demo_data):
    shutil.copytree(demo_data, storage.root / "bucket" / "placed")
    rows, indices = range(5), [1, 7, 7, 2]

    def sent():
        return sum(n for name, n in storage.sent.items() if ".tfrecord" in name)

    expected = elsewhere(read_frames, str(demo_data), rows, indices)
    before = sent()
    found = elsewhere(read_frames, "gs://bucket/placed", rows, indices)
    assert found == expected
    of_places = 12 * 7
    assert sent() - before == sum(told for _, told in found) - of_places * len(rows)
    # The records of earlier versions are read once, and their places are kept beside the index.
    (storage.root / "bucket" / "placed" / "train.places").unlink()
    assert elsewhere(read_frames, "gs://bucket/placed", rows, indices) == expected
    kept = storage.root / "bucket" / "placed" / "train.places"
    assert kept.read_bytes() == (demo_data / "train.places").read_bytes()
    for name, error in (("cut", "ends within"), ("gone", "No such file or directory")):
        for shard in kept.parent.glob("*-train.tfrecord-*"):
            shard.write_bytes(b"short") if name == "cut" else shard.unlink()
        with pytest.raises(Exception, match=error):
            elsewhere(read_frames, "gs://bucket/placed", rows, indices)


def decode(path, seconds):
    """The frames from the key frame at or before a time."""
    import av
    from etils import epath

    with epath.Path(path).open("rb") as file, av.open(file) as container:
        stream = container.streams.video[0]
        container.seek(round(seconds / stream.time_base), stream=stream)
        return numbers([f.to_ndarray(format="rgb24") for f in container.decode(stream)])


def test_a_video_is_decoded_there_from_any_time(elsewhere, storage, tmp_path):
    # The index of one is at the beginning, of the other at the end.
    for name in ("v.mp4", "v.mkv"):
        path = write_video(tmp_path / name, frames=60, options={"g": "20", "sc_threshold": "0"})
        shutil.copy(path, storage.root / "bucket")
        assert elsewhere(decode, f"gs://bucket/{name}", 0) == list(range(60))
        assert elsewhere(decode, f"gs://bucket/{name}", 1.4) == list(range(40, 60))


def use_tensorstore(spec):
    import tensorstore as ts

    store, seen = ts.KvStore.open({**spec, "path": "arrays/"}).result(), []
    old = store.write("a/b", b"old").result().generation
    new = store.write("a/b", b"0123456789").result().generation
    store.write("a/c", b"").result()
    store.write("d", b"x" * 3_000_000).result()
    for generation in (old, new):
        seen.append(store.read("a/b", if_not_equal=generation).result().state)
        store.write("a/b", b"changed " + store["a/b"], if_equal=generation).result()
        seen.append(store["a/b"])
    seen.append(store.read("a/b", byte_range=slice(2, 5)).result().value)
    seen.append(store.read("a/b", byte_range=slice(-4, None)).result().value)
    seen += [len(store["d"]), store["a/c"], store.read("e").result().state]
    seen.append(sorted(store.list().result()))
    seen.append(sorted(store.list(ts.KvStore.KeyRange("a/c", "d")).result()))
    store.delete_range(ts.KvStore.KeyRange("a/", "a0")).result()
    seen.append(sorted(store.list().result()))
    return seen


def test_tensorstore_finds_what_it_wrote(elsewhere, storage):
    there = elsewhere(use_tensorstore, {"driver": "gcs", "bucket": "bucket"})
    assert there == elsewhere(use_tensorstore, {"driver": "memory"})
    assert files(storage.root / "bucket" / "arrays") == {"d": b"x" * 3_000_000}


@pytest.fixture
def client(storage):
    """Connects Python's own client to a host of Google, its certificate tested."""
    bundle = storage.environment["CURL_CA_BUNDLE"]
    port = int(storage.environment["HTTPS_PROXY"].rpartition(":")[2])

    def connect(host="storage.googleapis.com"):
        context = ssl.create_default_context(cafile=bundle)
        connection = http.client.HTTPSConnection("127.0.0.1", port, context=context)
        connection.set_tunnel(host, 443)
        return open_until_the_end.enter_context(contextlib.closing(connection))

    with contextlib.ExitStack() as open_until_the_end:
        yield connect


UPLOAD = "/upload/storage/v1/b/bucket/o?uploadType=resumable&name=cut"


def ask(connection, method, path, **options):
    connection.request(method, path, **options)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def test_an_upload_that_is_cut_leaves_nothing_and_can_be_sent_again(client, storage):
    status, headers, _ = ask(client(), "POST", UPLOAD)
    assert status == 200
    session = headers["Location"].removeprefix("https://www.googleapis.com")
    whole = {"Content-Range": "bytes 0-9/10"}

    cut = client()
    cut.putrequest("PUT", session)
    for name, value in {**whole, "Content-Length": "10"}.items():
        cut.putheader(name, value)
    cut.endheaders(b"01234")
    cut.close()
    how_far = {"headers": {"Content-Range": "bytes */10"}}
    assert ask(client(), "PUT", session, **how_far)[0] == 308
    assert not (storage.root / "bucket" / "cut").exists()

    assert ask(client(), "PUT", session, body=b"0123456789", headers=whole)[0] == 200
    assert ask(client(), "PUT", session, **how_far)[0] == 200
    assert (storage.root / "bucket" / "cut").read_bytes() == b"0123456789"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/bucket/..%2Froot%2Fother"),
        ("GET", "/../root"),
        ("GET", "/bucket/a%2F%2Fb"),
        ("POST", "/storage/v1/b/bucket/o/a/compose"),
        ("POST", "/upload/storage/v1/b/bucket/o?uploadType=multipart"),
        ("PUT", "/bucket/a"),
    ],
)
def test_an_unsupported_request_is_refused(client, method, path):
    status, _, reason = ask(client(), method, path)
    assert status in (400, 404)
    assert reason


def test_other_hosts_are_out_of_reach(client):
    with pytest.raises(OSError, match="403"):
        client("example.com").connect()


def use_checkpoints(folder):
    """Returns what a run that is kept in the folder sees, and then one that finds damage."""
    import numpy as np
    import walk

    from timesformer_jax.checkpoints.store import Checkpoints, load_parameters

    state, seen = walk.start(), []
    with contextlib.closing(Checkpoints(folder, keep_newest=1, keep_best=1)) as found:
        for step, top1 in enumerate((0.9, 0.1, 0.2), 1):
            state = walk.go_on(state)
            found.save(step, state, {"position": step}, walk.METADATA)
            found.record_validation(step, {"top1": top1, "top5": 1.0})
    with contextlib.closing(Checkpoints(folder, keep_newest=1, keep_best=1)) as found:
        seen += [found.steps(), found.best_step(), found.validation]
        step, (restored, progress) = found.read_newest(
            lambda s: found.restore(s, walk.target(state))
        )
        seen += [step, progress, np.asarray(restored.params["a"]).tobytes()]
        (found.directory / "3" / "progress" / "metadata").write_text("{")
        step, _ = found.read_newest(lambda s: found.restore(s, walk.target(state)))
        found.set_aside_after(step)
        seen += [step, found.steps(), (found.directory / "3.damaged").exists()]
    try:
        load_parameters(f"{folder}/best")
    except ValueError as error:  # the walk's arrays are no model's
        seen.append(type(error).__name__)
    return seen


def test_checkpoints_are_kept_there(elsewhere, tmp_path):
    there = elsewhere(use_checkpoints, "gs://bucket/run/checkpoints")
    assert there == elsewhere(use_checkpoints, str(tmp_path / "checkpoints"))
    assert there[:2] == [[1, 3], 1]
