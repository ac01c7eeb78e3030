"""Hostile checkpoints: what they say is of other types, out of range, or more than they hold."""

import json
import os
import pathlib
import pickle
import shutil
import struct
import zipfile
from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file

from timesformer_jax.checkpoints import store
from timesformer_jax.checkpoints.checksums import json_checksum
from timesformer_jax.checkpoints.convert import convert
from timesformer_jax.checkpoints.load import load

GOLDENS = pathlib.Path(__file__).parents[1] / "data" / "goldens"
RELEASE = GOLDENS / "official_space_only.pyth"
DEEP = "[" * 100_000


class Hostile(NamedTuple):
    """A path, and whether it may be loaded: some odd values stand for "not given"."""

    path: str
    may_succeed: bool = False


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, folder):
        self.file = folder / "code_ran"

    def __reduce__(self):
        return pathlib.Path.touch, (self.file,)


def write_all(folder) -> list[Hostile]:
    """Writes all hostile checkpoints; `folder / "code_ran"` appears if one of them runs code."""
    makers = (torch_files, pickles, hugging_face, safetensors_files, npz_files, our_own)
    found = []
    for make in makers:
        place = folder / make.__name__
        place.mkdir()
        found += [Hostile(os.fspath(path), ok) for path, ok in make(place, folder)]
    return found


# ---- the authors' release -----------------------------------------------------------------------


ONE, ROW, HEAD = torch.ones(1), torch.ones(48), "head.weight"

# Parameters that take the place of others in the file, or stand beside them.
STATES = {
    "far_too_many_blocks": {"blocks.99999999.norm1.weight": ROW},
    "block_number_of_20_digits": {f"blocks.{10**19}.norm1.weight": ROW},
    "300_blocks": {f"blocks.{i}.norm1.weight": ROW for i in range(300)},
    "head_list": {HEAD: [1.0, 2.0]},
    "head_text": {HEAD: "weights"},
    "head_none": {HEAD: None},
    "head_dict": {HEAD: {"weight": ONE}},
    "head_sparse": {HEAD: torch.ones(10, 48).to_sparse()},
    "head_meta": {HEAD: torch.ones(10, 48, device="meta")},
    "head_expanded": {HEAD: ONE.expand(1 << 20, 1 << 20)},
    "head_of_all_memory": {HEAD: ONE.expand(1 << 40, 48)},
    "head_integers": {HEAD: torch.ones(10, 48, dtype=torch.int64)},
    "head_complex": {HEAD: torch.ones(10, 48, dtype=torch.complex64)},
    "head_bool": {HEAD: torch.ones(10, 48, dtype=torch.bool)},
    "head_empty": {HEAD: torch.ones(0, 48), "head.bias": torch.ones(0)},
    "head_scalar": {HEAD: torch.tensor(1.0)},
    "head_nan": {HEAD: torch.full((10, 48), torch.nan)},
    "bias_inf": {"head.bias": torch.full((10,), torch.inf)},
    "half_that_is_inf": {"norm.bias": torch.full((48,), torch.inf, dtype=torch.float16)},
    "patch_of_0": {"patch_embed.proj.weight": torch.ones(48, 3, 0, 0)},
    "width_0": {"patch_embed.proj.weight": torch.ones(0, 3, 8, 8)},
    "mlp_0": {"blocks.0.mlp.fc1.weight": torch.ones(0, 48)},
    "no_positions": {"pos_embed": torch.ones(1, 1, 48)},
    "name_is_number": {7: ONE},
    "name_is_tuple": {("a", "b"): ONE},
    "name_is_empty": {"": ONE},
    "name_changes_the_terminal": {"\x1b[2J\nhead": ONE},
    "name_is_a_megabyte": {"x" * (1 << 20): ONE},
}
# What the file says beside its parameters.
CONTENTS = {
    "heads_0": {"num_heads": 0},
    "heads_negative": {"num_heads": -4},
    "heads_text": {"num_heads": "four"},
    "heads_huge": {"num_heads": 10**9},
    "heads_of_1000_digits": {"num_heads": 10**1000},
    "heads_fraction": {"num_heads": 4.0},
    "heads_nan": {"num_heads": float("nan")},
    "heads_true": {"num_heads": True},
    "heads_list": {"num_heads": [4]},
    "heads_that_do_not_divide": {"num_heads": 5},
    "license_dict": {"num_heads": 4, "license": {"name": "mine"}},
    "license_number": {"num_heads": 4, "license": 3},
    "cfg_list": {"num_heads": 4, "cfg": ["NUM_FRAMES: 8"]},
    "cfg_frames_huge": {"num_heads": 4, "cfg": "NUM_FRAMES: 999999999\n"},
    "cfg_frames_0": {"num_heads": 4, "cfg": "NUM_FRAMES: 0\n"},
    "labels_number": {"num_heads": 4, "labels": 10},
    "labels_too_few": {"num_heads": 4, "labels": ["a"]},
    "state_list": {"model_state": [ONE]},
    "state_text": {"model_state": "weights"},
    "state_empty": {"model_state": {}},
}


def torch_files(folder, _):
    """A torch file of the release, with one thing changed in it."""

    def changed(name, state=(), without=(), **content):
        whole = torch.load(RELEASE, weights_only=True)
        for key in without:
            del whole["model_state"][f"model.{key}"]
        whole["model_state"] |= {
            f"model.{k}" if isinstance(k, str) else k: v for k, v in dict(state).items()
        }
        torch.save(whole | content, folder / f"{name}.pyth")
        return folder / f"{name}.pyth"

    for name, state in STATES.items():
        yield changed(name, state), False
    yield changed("block_missing", {"blocks.7.norm1.weight": ROW}), False
    yield changed("no_cls", without=["cls_token"]), False
    for name, content in CONTENTS.items():
        yield changed(name, **content), False
    yield changed("epoch_text", num_heads=4, epoch="three"), True
    yield changed("epoch_list", num_heads=4, epoch=[1, {"a": 2}], optimizer_state=None), True
    yield changed("heads_none", num_heads=None), True


def pickles(folder, canary):
    """Files that are pickles or zips, and should not be read as such."""
    whole = RELEASE.read_bytes()
    torch.save({"model_state": {"cls_token": Runs(canary)}}, folder / "code.pyth")
    torch.save({"a": Runs(canary)}, folder / "old.pth", _use_new_zipfile_serialization=False)
    contents = {
        "plain_code.pth": pickle.dumps(Runs(canary)),
        "empty.pth": b"",
        "zeros.pth": bytes(100_000),
        "text.pth": b"<html>404</html>",
        "nested.pth": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "length.pth": b"\x80\x02X\xff\xff\xff\x7f",
        "huge_long.pth": b"\x80\x02\x8b\xff\xff\xff\x7f",
        "cut.pyth": whole[: len(whole) // 2],
        "cut_end.pyth": whole[:-30],
        "changed.pyth": whole.replace(b"pos_embed", b"pos_em\xff\xff\xff", 1),
        "pickle_of_a_list.pth": pickle.dumps([1, 2, 3], protocol=2),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    with zipfile.ZipFile(folder / "nothing.pth", "w") as archive:
        archive.writestr("archive/version", "3")
    with (
        zipfile.ZipFile(RELEASE) as source,
        zipfile.ZipFile(folder / "no_storage.pth", "w") as archive,
    ):
        for entry in source.namelist():
            if not entry.endswith("/data/0"):
                archive.writestr(entry, source.read(entry))
    with zipfile.ZipFile(folder / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(64 << 20))
    os.mkfifo(folder / "fifo.pth")
    os.symlink("loop.pth", folder / "loop.pth")
    os.symlink("/dev/zero", folder / "device.pth")
    for name in sorted(os.listdir(folder)):
        yield folder / name, False
    yield folder / ("x" * 5000), False


# ---- Hugging Face directories -------------------------------------------------------------------


NAMES = {str(i): f"name {i}" for i in range(10)}

# Fields of config.json.
CONFIGS = {
    "heads_0": {"num_attention_heads": 0},
    "heads_negative": {"num_attention_heads": -1},
    "heads_text": {"num_attention_heads": "4"},
    "heads_huge": {"num_attention_heads": 10**9},
    "heads_null": {"num_attention_heads": None},
    "heads_list": {"num_attention_heads": [4]},
    "heads_fraction": {"num_attention_heads": 4.5},
    "frames_huge": {"num_frames": 10**9},
    "frames_text": {"num_frames": "8"},
    "frames_0": {"num_frames": 0},
    "frames_nan": {"num_frames": float("nan")},
    "image_size_huge": {"image_size": 10**9},
    "image_size_text": {"image_size": "32"},
    "patch_size_0": {"patch_size": 0},
    "hidden_size_other": {"hidden_size": 768},
    "layers_huge": {"num_hidden_layers": 10**6},
    "layers_dict": {"num_hidden_layers": {"a": 1}},
    "act_list": {"hidden_act": ["gelu"]},
    "eps_nan": {"layer_norm_eps": float("nan")},
    "labels_list": {"id2label": ["a"] * 10},
    "labels_text": {"id2label": "a,b"},
    "labels_number": {"id2label": 10},
    "labels_odd_keys": {"id2label": {f"LABEL_{i}": "a" for i in range(10)}},
    "labels_fraction_keys": {"id2label": {f"{i}.0": "a" for i in range(10)}},
    "labels_from_1": {"id2label": {str(i + 1): "a" for i in range(10)}},
    "labels_too_few": {"id2label": {"0": "a"}},
    "labels_numbers": {"id2label": dict.fromkeys(NAMES, 3)},
    "labels_null": {"id2label": dict.fromkeys(NAMES)},
    "labels_escape": {"id2label": NAMES | {"3": "\x1b]0;owned\x07"}},
    "labels_lines": {"id2label": NAMES | {"3": "a\nerror: b"}},
    "label_of_a_megabyte": {"id2label": NAMES | {"3": "x" * (1 << 20)}},
    "timm_text": {"pretrained_cfg": "mean"},
}
# Files that are no config.json.
TEXTS = {
    "config_list": "[1, 2]", "config_text": '"text"', "config_deep": DEEP,
    "config_deep_dict": '{"a":' * 100_000, "config_latin": '{"a": "é"}'.encode("latin-1"),
    "config_zeros": bytes(1000), "config_digits": '{"num_frames": ' + "9" * 10_000 + "}",
    "config_empty": "",
}  # fmt: skip
# Fields of preprocessor_config.json.
PREPROCESSORS = {
    "mean_text": {"image_mean": "0.45"},
    "mean_of_two": {"image_mean": [0.45, 0.45]},
    "mean_nan": {"image_mean": [float("nan")] * 3},
    "mean_of_texts": {"image_mean": ["a", "b", "c"]},
    "mean_dict": {"image_mean": {"r": 1}},
    "mean_nested": {"image_mean": [[0.45] * 3]},
    "std_0": {"image_std": [0, 0.225, 0.225]},
    "std_negative": {"image_std": [-1.0] * 3},
    "std_huge": {"image_std": [1e300] * 3},
    "std_true": {"image_std": [True] * 3},
}
# Contents of model.safetensors.index.json.
INDEXES = {
    "index_list": [], "index_null": {"weight_map": None}, "index_text": {"weight_map": "a"},
    "index_numbers": {"weight_map": {"a": 3}}, "index_lists": {"weight_map": {"a": ["b"]}},
    "index_outside": {"weight_map": {"a": "../../../etc/passwd"}},
    "index_itself": {"weight_map": {"a": "model.safetensors.index.json"}},
    "index_zero_byte": {"weight_map": {"a": "a\0b"}},
}  # fmt: skip


def hugging_face(folder, _):
    """A directory whose JSON files are changed."""
    convert(RELEASE, folder / "good", to="hf", num_heads=4)

    def changed(name, file="config.json", text=None, **fields):
        place = folder / name
        shutil.copytree(folder / "good", place)
        if text is None:
            path = place / file
            content = json.loads(path.read_text()) if path.exists() else {}
            text = json.dumps(content | fields)
        (place / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        return place

    for name, content in CONFIGS.items():
        yield changed(name, **content), False
    yield changed("labels_none", id2label=None), True
    for name, text in TEXTS.items():
        yield changed(name, text=text), False
    for name, content in PREPROCESSORS.items():
        yield changed(name, "preprocessor_config.json", **content), False
    yield changed("preprocessor_list", "preprocessor_config.json", text="[]"), False
    yield changed("mean_null", "preprocessor_config.json", image_mean=None), True
    for name, index in INDEXES.items():
        place = folder / name
        place.mkdir()
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
        yield place, False
    shutil.rmtree(folder / "good")
    place = folder / "weights_are_a_fifo"
    place.mkdir()
    os.mkfifo(place / "model.safetensors")
    (place / "config.json").write_text("{}")
    yield place, False


def safetensors_files(folder, _):
    """Files whose header says other things than the file holds."""
    array = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    headers = {
        "beyond": array | {"data_offsets": [0, 1 << 40]},
        "shape_huge": array | {"shape": [1 << 40, 1 << 20]},
        "shape_overflow": array | {"shape": [1 << 63, 2]},
        "shape_negative": array | {"shape": [-2, -2]},
        "shape_text": array | {"shape": "2, 2"},
        "dtype_unknown": array | {"dtype": "OBJECT"},
        "dtype_wrong": array | {"dtype": "F64"},
        "offsets_reversed": array | {"data_offsets": [16, 0]},
        "nothing": {},
    }
    for name, header in headers.items():
        text = json.dumps({"cls_token": header}).encode()
        content = struct.pack("<Q", len(text)) + text + bytes(16)
        (folder / f"{name}.safetensors").write_bytes(content)
        yield folder / f"{name}.safetensors", False
    for name, content in {
        "length_huge": struct.pack("<Q", 1 << 60) + b"{}",
        "length_0": struct.pack("<Q", 0) + b"{}",
        "header_deep": struct.pack("<Q", len(DEEP) + 6) + b'{"a": ' + DEEP.encode(),
        "header_no_json": struct.pack("<Q", 20) + b"{" * 20,
    }.items():
        (folder / f"{name}.safetensors").write_bytes(content)
        yield folder / f"{name}.safetensors", False
    arrays = {"cls_token": np.ones((1, 1, 8), np.int32), "patch_embed.proj.weight": np.ones(3)}
    save_file(arrays, folder / "integers.safetensors")
    yield folder / "integers.safetensors", False


def npz_files(folder, canary):
    """Zips whose arrays are said to be larger than what is stored of them."""

    def header(shape, dtype="'<f4'"):
        text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}"
        text += " " * (-(len(text) + 11) % 64) + "\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()

    contents = {
        "of_373_gib": header((100_000_000_000,)) + bytes(400),
        "more_than_memory": header((1 << 62,)) + bytes(400),
        "shape_overflow": header((1 << 40, 1 << 40)) + bytes(400),
        "shape_negative": header((-1,)) + bytes(400),
        "shape_text": header("'a'") + bytes(400),
        "shape_runs": header("__import__('os').system('true')") + bytes(400),
        "objects": header((3,), "'|O'") + pickle.dumps([Runs(canary)] * 3),
        "records": header((3,), "[('a', '<f4')]") + bytes(12),
        "texts": header((3,), "'<U4'") + bytes(48),
        "integers": header((3,), "'<i8'") + bytes(24),
        "cut": header((100,)) + bytes(30),
        "no_array": b"nothing",
        "version_9": b"\x93NUMPY\x09\x00" + bytes(100),
    }
    for name, content in contents.items():
        with zipfile.ZipFile(folder / f"{name}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("embedding/kernel.npy", content)
        yield folder / f"{name}.npz", False
    # Eight megabytes of zeros in eight kilobytes, 30 times.
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(30):
            archive.writestr(f"a{i}.npy", header((1 << 21,)) + bytes(8 << 20))
    yield folder / "bomb.npz", False
    np.savez(folder / "nothing.npz")
    yield folder / "nothing.npz", False
    np.savez(folder / "half_a_model.npz", **{"embedding/kernel": np.ones((8, 8, 3, 48), "f")})
    yield folder / "half_a_model.npz", False


# ---- our own ------------------------------------------------------------------------------------


# A group of the metadata, a field of it and its value; None: a field of the metadata themselves.
METADATA = (
    ("model", "num_heads", 0), ("model", "num_heads", "4"), ("model", "num_heads", True),
    ("model", "depth", 10**9), ("model", "depth", 300), ("model", "depth", 0),
    ("model", "hidden_size", 65_536), ("model", "hidden_size", 1.5),
    ("model", "num_classes", 1_000_000), ("model", "num_classes", None),
    ("model", "num_frames", 10**9), ("model", "image_size", 10**9),
    ("model", "patch_size", [8]), ("model", "mlp_ratio", float("nan")),
    ("model", "mlp_ratio", 1e300), ("model", "attention", ["divided"]),
    ("model", "attention", "nobody's"), ("model", "attention", "divided"),
    ("model", "dtype", "object"), ("model", "scan_layers", "no"),
    ("clip", "frames", "8"), ("clip", "frames", 10**12), ("clip", "frame_stride", -1),
    ("clip", "crop", 0), ("clip", "mean", "0.45"), ("clip", "mean", [0.45]),
    ("clip", "std", [0, 0, 0]), ("clip", "std", [float("nan")] * 3), ("clip", "start", 3),
    ("clip", "sampling", None), ("clip", "short_side", 10**9),
    (None, "labels", "text"), (None, "labels", 3), (None, "labels", [1] * 10),
    (None, "labels", ["a\x1b[2J"] * 10), (None, "labels", ["a"]), (None, "labels", None),
    (None, "config", []), (None, "config", {"data": "x"}),
    (None, "config", {"eval": {"batch_size": "8"}}),
    (None, "config", {"eval": {"batch_size": 10**9}}),
    (None, "config", {"data": {"directory": 3}}), (None, "license", 3), (None, "license", None),
    (None, "model", []), (None, "model", None), (None, "clip", "clip"), (None, "scheme_module", 3),
)  # fmt: skip


def our_own(folder, _):
    """A checkpoint of ours whose metadata were changed, with a checksum that fits them."""
    metadata, params = load(RELEASE, num_heads=4)
    store.save_parameters(folder / "good", params, metadata)

    def changed(name, change, text=None):
        place = folder / name
        shutil.copytree(folder / "good", place)
        path, sums = place / "0" / "metadata" / "metadata", place / "0" / "checksums" / "metadata"
        fields = json.loads(path.read_text())
        fields = change(fields) or fields
        path.write_text(json.dumps(fields) if text is None else text)
        found = json.loads(sums.read_text())
        sums.write_text(json.dumps(found | {"metadata": json_checksum(fields)}))
        return place

    def setter(group, field, value):
        def change(fields):
            (fields[group] if group else fields)[field] = value

        return change

    for group, field, value in METADATA:
        text = "".join(c if c.isalnum() else "_" for c in str(value))[:30]
        name = f"{group}_{field}_{text}" if group else f"{field}_{text}"
        yield changed(name, setter(group, field, value)), False

    def of_somebody(fields):
        fields["model"]["attention"], fields["scheme_module"] = "their_own", "antigravity"

    yield changed("scheme_of_a_module", of_somebody), False
    yield changed("metadata_list", lambda f: [f]), False
    yield changed("metadata_number", lambda f: 3), False
    yield changed("metadata_deep", lambda f: f, DEEP), False
    yield changed("metadata_empty", lambda f: f, ""), False
    for name, path, content in (
        ("sums_list", "0/checksums/metadata", "[]"),
        ("sums_text", "0/checksums/metadata", '{"params": "x", "metadata": "y"}'),
        ("validation_list", "validation.json", "[]"),
        ("validation_deep", "validation.json", DEEP),
        ("validation_huge", "validation.json", f'{{"0": {{"top1": 1{"0" * 400}}}}}'),
    ):
        place = changed(name, lambda f: f)
        (place / path).write_text(content)
        yield place, False
    place = changed("without_arrays", lambda f: f)
    shutil.rmtree(place / "0" / "params")
    yield place, False
    place = folder / "step_without_number"
    shutil.copytree(folder / "good" / "0", place / "zero")
    yield place / "zero", False
    (folder / "empty_folder").mkdir()
    yield folder / "empty_folder", False
    shutil.rmtree(folder / "good")
