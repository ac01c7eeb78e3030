"""Hostile videos: playlists by other names, damaged and lying files, what is no file at all."""

import os
import random
import socket
import struct
import zlib
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from videos import write_video

from timesformer_jax.data.decode import VideoError, decode_clip

SEEDS = {
    "mp4": ("libx264", {"g": "12", "bf": "3"}),
    "mkv": ("libx264", {"g": "12", "bf": "3"}),
    "avi": ("mpeg4", {}),
    "ts": ("libx264", {"g": "12"}),
    "webm": ("libvpx", {"deadline": "realtime"}),
    "flv": ("flv", {}),
    "wmv": ("wmv2", {}),
    "mpg": ("mpeg2video", {}),
    "gif": ("gif", {}),
    "mov": ("mjpeg", {}),
}


class Hostile(NamedTuple):
    """A path, and whether it may be decoded: a damaged file can still hold a video."""

    path: str
    may_succeed: bool


def write_all(folder, canary, count: int, seed: int = 0) -> list[Hostile]:
    """Writes `count` hostile videos, the designed ones first, then mutations of real videos."""
    seeds = write_seeds(folder)
    designed = [
        *playlists(folder, canary),
        *no_files(folder, canary),
        *liars(folder, canary, seeds["mp4"]),
    ]
    assert count > len(designed)
    chance = random.Random(seed)
    mutated = []
    for number in range(count - len(designed)):
        kind = sorted(seeds)[number % len(seeds)]
        path = folder / f"mutant{number:03}.{kind}"
        path.write_bytes(mutate(seeds[kind], chance))
        mutated.append(Hostile(os.fspath(path), True))
    return designed + mutated


def write_seeds(folder, kinds=tuple(SEEDS)) -> dict[str, bytes]:
    """The bytes of a small video in each container."""
    found = {}
    for kind in kinds:
        codec, options = SEEDS[kind]
        pixels = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        path = folder / f"seed.{kind}"
        write_video(path, frames=24, fps=25, codec=codec, pixels=pixels, options=options)
        found[kind] = path.read_bytes()
        path.unlink()
    return found


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Changes a few places of a file, in one of the ways that files get damaged or are forged."""
    content = bytearray(data)
    for _ in range(chance.choice((1, 1, 3, 10, 60))):
        at = chance.randrange(len(content))
        length = chance.choice((1, 4, 16, 300))
        match chance.randrange(7):
            case 0:
                content[at] ^= 1 << chance.randrange(8)
            case 1:
                content[at : at + length] = chance.randbytes(len(content[at : at + length]))
            case 2:
                content[at : at + 4] = struct.pack(">I", chance.choice(EXTREMES))
            case 3:
                del content[at : at + min(length, len(content) // 2)]
            case 4:
                other = chance.randrange(len(content))
                content[at:at] = content[other : other + length]
            case 5:
                content[at : at + length] = bytes(length)
            case 6 if len(content) > 200:
                del content[max(at, 100) :]
    return bytes(content)


EXTREMES = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 0x01000000, 0x7FFF0000)


# ---- playlists ----------------------------------------------------------------------------------


def playlists(folder, canary) -> list[Hostile]:
    """Files that name other files, local and on a server, in the formats that FFmpeg follows."""
    targets = {"file": os.fspath(canary.file), "url": f"file:{canary.file}", "http": canary.url}
    texts = {}
    for name, target in targets.items():
        texts[f"concat_{name}.mp4"] = f"ffconcat version 1.0\nfile '{target}'\n"
        texts[f"hls_{name}.mp4"] = (
            "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:1.0,\n"
            f"{target}\n#EXT-X-ENDLIST\n"
        )
        texts[f"dash_{name}.mp4"] = DASH.format(target)
        texts[f"master_{name}.mkv"] = f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{target}\n"
        texts[f"key_{name}.ts"] = (
            f'#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n'
            f"#EXTINF:1.0,\n{target}\n#EXT-X-ENDLIST\n"
        )
    host, port = canary.url.split("/")[2].split(":")
    texts["sdp.mp4"] = (
        f"v=0\no=- 0 0 IN IP4 {host}\ns=x\nc=IN IP4 {host}\nt=0 0\n"
        f"m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
    )
    for here, there in (("one", "two"), ("two", "one")):
        texts[f"{here}.avi"] = f"ffconcat version 1.0\nfile {there}.avi\n" * 2
    texts["rtsp.mp4"] = f"[Reference]\nRef1=rtsp://{host}:{port}/x\n"
    texts["smil.mov"] = f'<smil><body><video src="{canary.url}"/></body></smil>'
    texts["lavfi.mp4"] = f"movie={canary.file}"
    texts["subtitles.mp4"] = f"1\n00:00:00,000 --> 00:00:01,000\n{canary.file}\n"
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [Hostile(os.fspath(folder / name), False) for name in texts]


DASH = """<?xml version="1.0"?>
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="urn:mpeg:dash:profile:full:2011"
 type="static" mediaPresentationDuration="PT1S" minBufferTime="PT1S"><Period><AdaptationSet
 mimeType="video/mp4"><Representation id="1" bandwidth="1" width="64" height="48"
 codecs="avc1.42c00a"><BaseURL>{0}</BaseURL><SegmentList duration="1"><Initialization
 sourceURL="{0}"/><SegmentURL media="{0}"/></SegmentList></Representation></AdaptationSet></Period>
</MPD>"""


# ---- no files -----------------------------------------------------------------------------------


def no_files(folder, canary) -> list[Hostile]:
    """FIFOs, sockets, devices, links to them, loops, folders; and files that are no video."""
    os.mkfifo(folder / "fifo.mp4")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(folder / "socket.mp4"))
    listener.close()
    for name, target in {
        "zero.mp4": "/dev/zero",
        "tty.mp4": "/dev/tty",
        "loop.mp4": "loop.mp4",
        "link_to_fifo.mp4": "fifo.mp4",
        "nowhere.mp4": "/nowhere/x.mp4",
        "memory.mp4": "/proc/self/mem",
    }.items():
        (folder / name).symlink_to(target)
    (folder / "empty_folder.mp4").mkdir()
    for name, image in {"fifos": "fifo", "links": "link", "bomb": "png", "text": "text"}.items():
        inside = folder / f"{name}.frames"
        inside.mkdir()
        first, second = inside / "0.png", inside / "1.png"
        if image == "fifo":
            os.mkfifo(first)
        elif image == "link":
            first.symlink_to("/dev/zero")
        elif image == "png":
            first.write_bytes(png_header(60_000, 60_000))
        else:
            first.write_text(f"ffconcat version 1.0\nfile '{canary.file}'\n")
        second.write_bytes(png_header(8, 8))
    contents = {
        "empty.mp4": b"",
        "zeros.mp4": bytes(100_000),
        "text.mp4": b"no video " * 500,
        "elf.mp4": b"\x7fELF\x02\x01\x01" + bytes(200),
        "zip.mp4": b"PK\x03\x04" + bytes(200),
        "picture.mp4": png_header(60_000, 60_000),
        "bomb.gif": b"GIF89a\xff\xff\xff\xff\xf0\0\0" + bytes(6) + b"\x2c" + bytes(9) + b"\x02\0;",
        "html.mp4": b"<html><body>404</body></html>" * 50,
        "pickle.avi": b"\x80\x04\x95" + bytes(50),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    names = ["fifo.mp4", "socket.mp4", "zero.mp4", "tty.mp4", "loop.mp4", "link_to_fifo.mp4"]
    names += ["nowhere.mp4", "memory.mp4", "empty_folder.mp4", *contents]
    names += ["fifos.frames", "links.frames", "bomb.frames", "text.frames"]
    return [Hostile(os.fspath(folder / name), False) for name in names] + [
        Hostile(os.fspath(folder / "missing.mp4"), False),
        Hostile(os.fspath(folder / ("long" * 2000)), False),
        Hostile(os.fspath(folder / "null\0byte.mp4"), False),
    ]


def png_header(width: int, height: int) -> bytes:
    """A small PNG of one colour whose header asks for this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


# ---- liars --------------------------------------------------------------------------------------


def liars(folder, canary, mp4: bytes) -> list[Hostile]:
    """Videos whose header says what is not so, each in one field."""
    found = []

    def write(name: str, content: bytes, may_succeed: bool = True) -> None:
        assert content != mp4, name
        (folder / name).write_bytes(content)
        found.append(Hostile(os.fspath(folder / name), may_succeed))

    url = b"\0\0\0\0" + struct.pack(">I", 1)  # version, entries
    link = os.fsencode(canary.file)
    for kind in (b"url ", b"alis"):
        write(
            f"reference_{kind.decode().strip()}.mp4", replace(mp4, b"dref", url + entry(kind, link))
        )
    for value in EXTREMES:
        write(f"samples_{value:x}.mp4", patch(mp4, b"stsz", 4, ">II", 1, value))
        write(f"timescale_{value:x}.mp4", patch(mp4, b"mdhd", 12, ">I", value))
        write(f"delta_{value:x}.mp4", patch(mp4, b"stts", 12, ">I", value))
        write(f"repeats_{value:x}.mp4", patch(mp4, b"stts", 8, ">I", value))
        write(f"perchunk_{value:x}.mp4", patch(mp4, b"stsc", 12, ">I", value))
        write(f"duration_{value:x}.mp4", patch(mp4, b"mvhd", 16, ">I", value))
        write(f"edit_{value:x}.mp4", patch(mp4, b"elst", 8, ">II", value, value))
    for ratio in ((1, 2**31 - 1), (2**31 - 1, 1), (0, 1)):
        aspect = write_video(folder / "aspect.mp4", frames=8, aspect=Fraction(3, 2)).read_bytes()
        write(f"aspect_{ratio[0]}.mp4", patch(aspect, b"pasp", 0, ">II", *ratio))
    for size in ((65535, 65535), (0, 0), (1, 65535)):
        write(f"size_{size[0]}_{size[1]}.mp4", patch(mp4, b"stsd", 40, ">HH", *size))
    write("matrix.mp4", patch(mp4, b"tkhd", 40, ">9i", *([2**31 - 1] * 9)))
    write("growing.avi", growing_stream(folder))
    write("late.mp4", late_frame(folder))
    write("cut_header.mp4", mp4[: len(mp4) // 2])
    return found


def late_frame(folder) -> bytes:
    """Two frames, years apart."""
    times = [0, 40, 2**40]
    return write_video(folder / "years.mkv", frames=3, times=times).read_bytes()


def growing_stream(folder) -> bytes:
    """A stream of pictures, of which the later ones are larger than the header says."""
    with av.open(str(folder / "grows.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        for number, side in enumerate((32, 32, 32, 1024, 1024)):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt = side, side, "yuvj420p"
            encoder.time_base = Fraction(1, 25)
            for packet in encoder.encode(av.VideoFrame(side, side, "yuvj420p")):
                packet.stream, packet.pts, packet.dts = stream, number, number
                container.mux(packet)
    return (folder / "grows.avi").read_bytes()


def entry(kind: bytes, target: bytes) -> bytes:
    """An entry of a data reference box: a file that the samples are said to lie in."""
    if kind == b"url ":
        body = b"\0\0\0\0" + target + b"\0"
    else:  # an alias of a Macintosh: volume, folders and name, then the path as record 2
        path = struct.pack(">hH", 2, len(target)) + target + bytes(len(target) % 2)
        name = target.rsplit(b"/")[-1][:63]
        body = b"\0\0\0\0" + bytes(10) + bytes([4]) + b"disk".ljust(27, b"\0") + bytes(12)
        body += bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16) + bytes(2) + bytes(2)
        body += bytes(12) + path + struct.pack(">hH", -1, 0)
    return struct.pack(">I4s", 8 + len(body), kind) + body


# ---- boxes of MP4 -------------------------------------------------------------------------------


def patch(data: bytes, box: bytes, offset: int, form: str, *values: int) -> bytes:
    """Overwrites numbers at an offset of the content of the first box of this name."""
    at = data.index(box) + 4 + offset
    new = struct.pack(form, *values)
    return data[:at] + new + data[at + len(new) :]


def replace(data: bytes, name: bytes, content: bytes) -> bytes:
    """Replaces the content of the first box of this name, with the sizes of those around it."""
    at = data.index(name) - 4
    (size,) = struct.unpack(">I", data[at : at + 4])
    grown = 8 + len(content) - size
    changed = bytearray(data[:at] + struct.pack(">I4s", 8 + len(content), name) + content)
    changed += data[at + size :]
    for outer in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        place = data.index(outer) - 4
        (old,) = struct.unpack(">I", data[place : place + 4])
        changed[place : place + 4] = struct.pack(">I", old + grown)
    return bytes(changed)


# ---- what becomes of them -----------------------------------------------------------------------


def decode(path: str) -> str:
    """Decodes four frames, as `predict` does: "", or the reason why it cannot."""

    def evenly(count: int, fps: float) -> np.ndarray:
        return np.linspace(0, count - 1, 4).astype(int)

    try:
        clip = decode_clip(path, sample=evenly, short_side=32)
    except VideoError as error:
        return str(error)
    assert clip.frames.shape[0] == 4
    assert min(clip.frames.shape[1:3]) == 32
    return ""
