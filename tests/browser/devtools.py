"""A headless Chromium and one page of it, driven over a pipe by the DevTools protocol.

A pipe needs no library, and unlike a port no other program can reach it.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time

FLAGS = ("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu",
         "--disable-extensions", "--disable-sync", "--disable-component-update",
         "--disable-background-networking", "--disable-default-apps", "--hide-scrollbars",
         # The shared memory of a container is small, and its root has no sandbox to enter.
         "--disable-dev-shm-usage", "--no-sandbox",
         # What a page asks for is counted; it must not be answered as well.
         "--host-resolver-rules=MAP * ~NOTFOUND")


class Page:
    """The one page of a browser of its own; what it asks for and complains about is kept.

    Attributes:
        requests: addresses of everything the page asked for, itself included.
        errors: console errors, exceptions, refusals of the security policy and dialogs.
    """

    def __init__(self, profile):
        pipes = read, self._write, self._read, write = *os.pipe(), *os.pipe()
        program = shutil.which("chromium")
        assert program, "no chromium here; tests/browser/setup.sh install"
        self._log = profile / "chromium.log"
        # The protocol's pipes are the descriptors 3 and 4, which may be pipes of another end here.
        read, write = (fcntl.fcntl(pipe, fcntl.F_DUPFD, 10) for pipe in (read, write))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", f'exec "$0" "$@" 3<&{read} 4>&{write}', program, *FLAGS,
                 f"--user-data-dir={profile}", "about:blank"],
                pass_fds=(read, write), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)
        for pipe in (pipes[0], pipes[3], read, write):
            os.close(pipe)
        self._buffer, self._count, self._session = b"", 0, None
        self.events, self.requests, self.errors = [], [], []
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target,
                                      flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def close(self):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._read, self._write):
            os.close(pipe)

    def call(self, method, **parameters):
        """Calls a method of the protocol and returns its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self, seconds=60):
        deadline = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, deadline - time.monotonic()))
            part = os.read(self._read, 1 << 20) if ready else b""
            assert part, f"the browser has ended or is silent: {self._log.read_text()[-2000:]}"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self._note(message["method"], message["params"])
        return message

    def _note(self, event, told):
        self.events.append(event)
        if event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(told["exceptionDetails"]["text"])
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            self.errors.append(str(told["args"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(told["entry"]["text"])
        elif event == "Page.javascriptDialogOpening":
            self.errors.append(f"dialog: {told['message']}")
            raise AssertionError(self.errors[-1])

    def open(self, path, *, width=1280, dark=False, mobile=False, sharp=False):
        """Opens a file on a screen of that width and colour scheme, and waits until it is drawn."""
        self.requests.clear()
        self.errors.clear()
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800,
                  deviceScaleFactor=2 if sharp else 1, mobile=mobile)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=path.as_uri())
        while "Page.loadEventFired" not in self.events:
            self._receive()
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")

    def run(self, script):
        """Evaluates JavaScript in the page and returns its value; waits for a promise."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True,
                          awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, file, step=10_000):
        """Writes the whole page as PNG; of a long page the further parts as FILE-2.png, …."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        for part, top in enumerate(range(0, int(size["height"]), step), 1):
            shot = self.call("Page.captureScreenshot", captureBeyondViewport=True,
                             optimizeForSpeed=True, clip={
                                 "x": 0, "y": top, "width": size["width"], "scale": 1,
                                 "height": min(step, size["height"] - top)})
            name = file if part == 1 else file.with_stem(f"{file.stem}-{part}")
            name.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, file):
        """Prints the page on A4."""
        told = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69,
                         printBackground=True)
        file.write_bytes(base64.b64decode(told["data"]))
