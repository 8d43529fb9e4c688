"""The processes of one server that share a port: those that die are replaced, counted and said."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from socket import socket
from typing import Any

import uvicorn
from uvicorn.supervisors import Multiprocess

from visadapt.errors import VisadaptError
from visadapt.optional import require

REPLACES = "VISADAPT_REPLACES"
"""Environment variable of a process that was started instead of one that died."""

STARTUP_FAILED = 3
"""Status with which uvicorn ends a process whose application does not start."""


def end_with_supervisor() -> None:
    """Let SIGTERM end this process when the one that started it is gone: one that is killed cannot end the others.

    They would go on answering at its port, and nothing would stop or replace them.
    """
    supervisor = multiprocessing.parent_process()
    if supervisor is None:
        return

    def wait() -> None:
        supervisor.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="visadapt-supervisor", daemon=True).start()


class Processes(Multiprocess):
    """uvicorn's supervisor.

    Args:
        config: of the servers, with their number.
        sock: at which they listen.
        folder: where they write their metrics.
        say: receives a line about each process that died.
    """

    def __init__(self, config: uvicorn.Config, sock: socket, folder: str, say: Callable[[str], None]) -> None:
        options: dict[str, Any] = {"sockets": [sock]}
        if "target" in inspect.signature(Multiprocess.__init__).parameters:
            # before version 0.52, uvicorn is also told what a process runs
            options["target"] = uvicorn.Server(config).run
        super().__init__(config, **options)
        self._folder, self._say, self._failed = folder, say, False

    def run(self) -> None:
        """Run until SIGTERM or SIGINT.

        Raises:
            VisadaptError: the application of a process did not start.
        """
        super().run()
        if self._failed:
            raise VisadaptError("a process of the server did not start; its log says why")

    def keep_subprocess_alive(self) -> None:
        """Replace the processes that died."""
        if any(process.process.exitcode == STARTUP_FAILED for process in self.processes):
            # another would fail as well
            self._failed = True
            self.should_exit.set()
            return
        before = list(self.processes)
        os.environ[REPLACES] = "1"
        try:
            super().keep_subprocess_alive()
        finally:
            del os.environ[REPLACES]
        for process in before:
            if process not in self.processes:
                self._forget(process.process.pid)
                self._say(f"process {process.process.pid} died ({process.process.exitcode}) and is replaced")

    def _forget(self, pid: int | None) -> None:
        """Remove what a process said of its present state from the metrics; what it counted stays."""
        require("prometheus_client.multiprocess", "serving", "visadapt[serve]").mark_process_dead(pid, self._folder)

    def terminate_all(self) -> None:
        """End all processes, and the port with them: connections that this process keeps open would not be answered."""
        super().terminate_all()
        for sock in self.sockets:
            sock.close()
