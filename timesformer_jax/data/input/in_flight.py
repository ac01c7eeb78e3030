"""How many clips the input pipeline has in memory at a time, and how many bytes they are at most.

A shuffle is a permutation of record numbers and holds no clips. Of small batches two wait decoded
while one is used. Of large ones, or of long clips, one batch is filled while one is used: from
pieces of a few frames, which are all that is decoded in between. So the longer a clip is, the fewer
are in memory, down to two batches.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from timesformer_jax.data.records.access import LONG_RECORD_BYTES, READ_THREADS
from timesformer_jax.data.records.split import Split
from timesformer_jax.workers import available_cores

READ_AHEAD = 2  # small batches

# Batches of more decoded bytes, or clips of more frames, are filled from pieces.
BATCH_BYTES = 256 << 20
CLIP_FRAMES = 256
# A piece has at most so many frames, and the pieces that are decoded at a time so many bytes.
PIECE_FRAMES = 128
PIECES_BYTES = 256 << 20
# Of the encoded frames that are read at a time, if they are more than those of one row.
ENCODED_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class InFlight:
    """What is in memory at a time of batches of one shape: b rows of V views and C crops.

    Attributes:
      rows: b, of this process.
      views, crops: V, C.
      frames: of a view, T.
      side: S, of the squares that are decoded, in pixels.
      frame_bytes: of a whole frame, decoded; of the largest of the split.
      encoded_bytes: of a frame as it is stored; in the record where they are largest.
      record_bytes: of the largest record that is read whole.
    """

    rows: int
    views: int
    crops: int
    frames: int
    side: int
    frame_bytes: int
    encoded_bytes: int
    record_bytes: int

    @classmethod
    def of(
        cls, split: Split, *, rows: int, views: int, crops: int, frames: int, side: int
    ) -> InFlight:
        """Of batches of a split."""
        pixels = split.height.astype(np.int64) * split.width
        whole = split.size[split.size <= LONG_RECORD_BYTES]
        return cls(
            rows, views, crops, frames, side,
            frame_bytes=3 * int(pixels.max()),
            encoded_bytes=math.ceil((split.size / split.num_stored).max()),
            record_bytes=int(whole.max(initial=0)),
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a batch's frames: (b, V * C, T, S, S, 3)."""
        return self.rows, self.views * self.crops, self.frames, self.side, self.side, 3

    @property
    def in_pieces(self) -> bool:
        """Whether a batch is filled from pieces."""
        return math.prod(self.shape) > BATCH_BYTES or self.views * self.frames > CLIP_FRAMES

    @property
    def calls(self) -> int:
        """Pieces, or whole rows, that are decoded at the same time."""
        return available_cores()

    @property
    def piece(self) -> int:
        """Frames of each view that are decoded at a time."""
        if not self.in_pieces:
            return self.frames
        of_frame = self.views * self.crops * self.side**2 * 3
        most = min(PIECE_FRAMES // self.views, PIECES_BYTES // (self.calls * of_frame))
        return -(-self.frames // -(-self.frames // max(most, 1)))

    @property
    def starts(self) -> np.ndarray:
        """(pieces,) the first frame of each piece; the last one may overlap the one before."""
        pieces = -(-self.frames // self.piece)
        return np.minimum(np.arange(pieces) * self.piece, self.frames - self.piece)

    @property
    def reads(self) -> int:
        """Rows whose encoded frames are read at the same time."""
        if not self.in_pieces:
            return self.rows
        of_row = self.views * self.frames * self.encoded_bytes
        return min(max(ENCODED_BYTES // of_row, 1), self.rows)

    @property
    def batches(self) -> int:
        """Of decoded batches: the one that is used, those that wait, and the one being made."""
        return 2 if self.in_pieces else 2 + READ_AHEAD

    @property
    def clips(self) -> int:
        """Decoded clips."""
        return self.batches * self.rows * self.views * self.crops

    @property
    def bytes(self) -> int:
        """At most, of the memory of this process."""
        # One more batch is on its way to the device, and tf.data makes one by copying its rows.
        batches = self.batches + (1 if self.in_pieces else 2)
        # A frame is decoded, its squares are cut out of it, and those of a piece put together.
        of_frame = self.frame_bytes + 2 * self.crops * self.side**2 * 3
        decoded = batches * math.prod(self.shape)
        decoded += self.calls * self.views * self.piece * of_frame
        # Encoded rows are read while those before them are handed over; others wait or are decoded.
        rows = 2 * self.reads + 4 if self.in_pieces else (READ_AHEAD + 4) * self.rows
        encoded = rows * self.views * self.frames * self.encoded_bytes
        return decoded + encoded + min(READ_THREADS, self.reads) * self.record_bytes

    def __str__(self) -> str:
        return (
            f"up to {self.bytes / 2**30:.2g} GiB for {self.clips:,} clips of {self.frames:,} frames"
            " in flight"
        )
