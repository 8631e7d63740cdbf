"""`causalrt serve` in a process of its own."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import httpx
from websockets.sync.client import connect

from support.running import until


class Process:
    """A server that runs in a process of its own, with `descriptors` at most; without places, that of the demo model."""

    def __init__(self, places, *flags, descriptors=None):
        command = [sys.executable, "-m", "causalrt.cli", "serve"]
        if places:
            bundle, encoder = places
            command += [str(bundle), "--text-encoder", str(encoder)]
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--json", "--threads", "1", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=descriptors and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))),
        )
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.url = json.loads(line)["url"]
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def finished(self, video_id):
        def ended():
            video = self.http.get(f"/v1/videos/{video_id}").json()
            return video["status"] in ("completed", "failed") and video

        return until(ended)

    def realtime(self):
        return connect(self.url.replace("http", "ws") + "/v1/realtime", compression=None)

    def descendants(self):
        """Process numbers of the ranks, the decoder, and their supervisors."""
        found, new = [], [self.process.pid]
        while new:
            parents, new = new, []
            for status in Path("/proc").glob("[0-9]*/stat"):
                try:
                    fields = status.read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[1]) in parents:
                    new.append(int(status.parent.name))
            found += new
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.close()
        self.process.kill()
        self.process.communicate()
