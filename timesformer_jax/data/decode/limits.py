"""What may be decoded: FFmpeg takes a file for what its bytes say, whatever its name says."""

from dataclasses import dataclass

# FFmpeg's names of the containers that hold all their data in one file. Its demuxers of playlists
# (concat, hls, dash, sdp) open what they name, on the disk and in the network; those of devices
# read screens and cameras.
DEMUXERS = (
    *("asf", "avi", "flv", "gif", "ivf", "matroska", "mov", "mpeg", "mpegts", "mpegvideo", "mxf"),
    *("nut", "ogg"),
)

# FFmpeg's names of the decoders, for video. Left out: those of games, screen recorders that nobody
# uses now, still images with formats of their own, hardware, and what is experimental.
DECODERS = (
    *("cfhd", "cinepak", "dirac", "dnxhd", "dvvideo", "ffv1", "ffvhuff", "flashsv", "flv", "gif"),
    *("h261", "h263", "h263i", "h263p", "h264", "hevc", "huffyuv", "indeo3", "indeo4", "indeo5"),
    *("jpeg2000", "libdav1d", "libvpx", "libvpx-vp9", "magicyuv", "mjpeg", "mpeg1video"),
    *("mpeg2video", "mpeg4", "mpegvideo", "msmpeg4", "msmpeg4v1", "msmpeg4v2", "msrle", "msvideo1"),
    *("png", "prores", "qtrle", "rawvideo", "rpza", "rv10", "rv20", "rv30", "rv40", "snow", "svq1"),
    *("svq3", "theora", "utvideo", "v210", "vc1", "vp3", "vp6", "vp6a", "vp6f", "vp8", "vp9"),
    *("vvc", "wmv1", "wmv2", "wmv3"),
)

# The sound is not decoded; but FFmpeg reads megabytes of a file until it knows the sound's format.
SOUND_DECODERS = (
    *("aac", "aac_latm", "ac3", "adpcm_ima_qt", "adpcm_ima_wav", "adpcm_ms", "adpcm_swf", "alac"),
    *("amrnb", "amrwb", "dca", "eac3", "flac", "libopus", "mp1float", "mp2", "mp2float", "mp3"),
    *("mp3float", "nellymoser", "opus", "pcm_alaw", "pcm_f32le", "pcm_mulaw", "pcm_s16be"),
    *("pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_u8", "speex", "truehd", "vorbis", "wmapro"),
    *("wmav1", "wmav2"),
)


@dataclass(frozen=True)
class Limits:
    """What one video may cost. A video beyond a limit is a VideoError.

    The limits are far beyond the data sets and far below what exhausts a machine.

    Attributes:
      pixels: of a frame, both as stored and as it is shown or resized to.
      frames: of a video, and ticks of a clip's timeline.
      hours: that a clip lasts.
      minutes: of work on one open file.
    """

    pixels: int = 1 << 26
    frames: int = 1 << 23
    hours: float = 48.0
    minutes: float = 120.0


LIMITS = Limits()
