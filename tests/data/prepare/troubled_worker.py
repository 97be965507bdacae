"""The jobs of prepare and index with a decoder that crashes on some videos and hangs on others, by their names."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from avppc.data.prepare.index import InspectJob
from avppc.data.prepare.worker import DecodeJob
from avppc.data.video.source import DecodeError, damage_as_decode_error


class TroubledJob(DecodeJob):
    def clips_of(self, video, record, report):
        try:
            self.trouble(self.config.data / video.path)
        except DecodeError as error:
            record.refused.append((video.path, error.reason))
            return iter(())
        return super().clips_of(video, record, report)

    def trouble(self, path):
        if "crash" in path.name:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "once" in path.name and not path.with_suffix(".seen").exists():
            path.with_suffix(".seen").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang" in path.name:
            time.sleep(600)
        if "spin" in path.name:
            while True:
                pass
        if "stop" in path.name:  # as when a laptop sleeps, for longer than the time-out
            subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        if "big" in path.name:
            with damage_as_decode_error(path):
                bytearray(8 << 30)


class TroubledInspection(InspectJob):
    def handle(self, unit, refused, report):
        for video in unit.videos:
            if video.path in refused:
                continue
            report.video(video.path)
            if "crash" in video.path:
                os.kill(os.getpid(), signal.SIGSEGV)
            if "hang" in video.path:
                time.sleep(600)
        return super().handle(unit, refused, report)
