"""The check of a persistent driver: it is written to, stopped, and served again, by a fork and by its recipe."""

from __future__ import annotations

from prefault.device.driver import Device
from prefault.testing._driver_scenes import DriverBench, Scene


class PersistenceCheck(DriverBench):
    """Part of the check: what clients wrote is there in the next server."""

    def check_persistence(self) -> None:
        """Check that written and discarded pages are the same after the device was stopped and served again."""
        device = self.make()
        now = dict(self.initial)
        # First with clients that end before the server, then with some that are left.
        for outlived in (False, True):
            left = "with clients that are left" if outlived else "after its clients"
            with self.serving(f"clients write, and it is stopped {left}", device=device, outlived=outlived) as scene:
                self._write(scene, now)
            self._check_counts(scene)
            with self.serving(f"it was written to, stopped {left}, and is served again", device=device) as scene:
                order = self.random.sample(self.good(), len(self.good()))
                found = scene.client(area={}).touch("area", order, self.size)
                self.compare(scene, found, now, "and lost what was written to it before")
            self._check_counts(scene)
        if device.recipe() is not None:
            self._check_remade(device, now)

    def _write(self, scene: Scene, now: dict[int, bytes]) -> None:
        """Write to half of the pages, discard some, and record the bytes."""
        client = scene.client(area={"access": "write"} if self.device.writable else {})
        good = self.good()
        for page in self.random.sample(good, -(-len(good) // 2)) if self.device.writable else ():
            byte = self.random.randint(1, 255)
            client.ask("write", area="area", page=page, byte=byte)
            inside = min(self.size, self.device.length - page * self.size)
            now[page] = bytes([byte]) * inside + bytes(self.size - inside)
        if self.after_discard != "any":
            run = self.random.choice(self.runs(good))
            client.ask("discard", area="area", first=run.start, pages=len(run))
            for page in run:
                if (page + 1) * self.size <= self.device.length:  # discarding rounds inward
                    now[page] = bytes(self.size) if self.after_discard == "zeros" else self.initial[page]
        client.touch("area", self.random.sample(good, len(good)), self.size)

    def _check_counts(self, scene: Scene) -> None:
        """Check that the server called start first and stop last, once each."""
        kinds = [call.kind for call in scene.journal.calls().values()]
        if (kinds[0], kinds[-1]) != ("start", "stop") or kinds.count("start") + kinds.count("stop") != 2:
            raise self.wrong(f"the calls are not framed by one start() and one stop(), when {scene.what}: {kinds}")

    def _check_remade(self, device: Device, now: dict[int, bytes]) -> None:
        with self.serving_recipe(device, "it was written to and stopped, and is made by its recipe") as scene:
            found = scene.client(area={}).touch("area", self.good(), self.size)
            self.compare(scene, found, now, "and lost what was written to it before")
