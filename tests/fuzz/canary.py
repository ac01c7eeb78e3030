"""What hostile files would like to open: files and a server that note who comes."""

import contextlib
import ctypes
import os
import socket
import threading

IN_OPEN = 0x20
IN_NONBLOCK = os.O_NONBLOCK


class Canary:
    """Files of one folder and a port of this machine, which nobody has a reason to open.

    Attributes:
      file: a real video, so that who opens it by mistake would succeed.
      url: of the port.
      opened: what was opened so far, by any process and any library.
    """

    def __init__(self, folder, video: bytes):
        self.file = folder / "canary.mp4"
        self.file.write_bytes(video)
        (folder / "canary.txt").write_text("secret")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = self._libc.inotify_init1(IN_NONBLOCK)
        assert self._inotify >= 0, os.strerror(ctypes.get_errno())
        assert self._libc.inotify_add_watch(self._inotify, os.fsencode(folder), IN_OPEN) >= 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}/canary.mp4"
        self._visits = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                visitor, _ = self._server.accept()
                self._visits.append("the port")
                visitor.close()

    @property
    def opened(self) -> list[str]:
        with contextlib.suppress(BlockingIOError):
            # An event: four numbers, and the name of the file, padded with zeros.
            name, *_ = os.read(self._inotify, 1 << 16)[16:].split(b"\0")
            self._visits.append(os.fsdecode(name))
        return list(self._visits)

    def close(self):
        self._server.close()
        os.close(self._inotify)
