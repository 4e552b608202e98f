"""An enclave that outgrows its page cache: 16 MiB of memory, of which 2 MiB at most lie anywhere in the clear.

The enclave page cache is a model of SGX's. Pages are added when they are touched, or in bulk by populate; where the cache is
full, pages are encrypted, authenticated and evicted to ordinary memory. A page that somebody changes there is an error, and
never wrong bytes. Needs the package cryptography: pip install 'prefault[enclave]'.
"""

from __future__ import annotations

import random
import sys

import prefault
import prefault.device
from prefault.drivers.enclave import Enclave, EnclaveError, EnclavePageCache, PageType, statistics

PAGE = 4096


def main() -> None:
    """Write all over an enclave, read it back, and change what its pages may be used for."""
    chance = random.Random(1)
    try:
        device = EnclavePageCache("2 MiB")
    except ImportError as missing:
        print(missing)  # with the command that installs it
        return
    with prefault.device.open(device) as cache:
        enclave = Enclave.create(cache, "vault", "16 MiB")
        with enclave.map() as area:
            # The first half of the cache in one call: 256 pages added and accepted, and not one fault.
            prefault.populate(area, length="1 MiB")
            print(f"populated: {area.stats()}")

            written = {}
            with area.memoryview() as memory:
                for _ in range(20_000):
                    at = chance.randrange(len(memory))
                    memory[at] = written[at] = chance.randrange(256)
                lost = sum(memory[at] != byte for at, byte in written.items())
            found = statistics(cache)
            print(
                f"{len(written)} bytes written at random, {lost} lost; {found.frames} of {found.capacity} frames in use,"
                f" {found.evicted} pages encrypted and evicted, {found.loaded} decrypted and loaded"
            )

            # Permissions are restricted by the kernel (EMODPR), and the enclave accepts that (EACCEPT).
            enclave.emodpr(0, PAGE, "r")
            enclave.eaccept(0, PAGE, permissions="r")
            print(f"page 0: {enclave.pages(0, PAGE)[0].info}")

            # Pages are removed in three steps, each of which needs the one before.
            try:
                enclave.remove(0, PAGE)
            except EnclaveError as refused:
                print(refused)
            enclave.emodt(0, PAGE, PageType.TRIM)
            enclave.eaccept(0, PAGE, permissions="", page_type=PageType.TRIM, modified=True)
            enclave.remove(0, PAGE)
            print(f"page 0 now: {enclave.pages(0, PAGE) or 'not there'}")
        sys.exit(lost > 0)


if __name__ == "__main__":
    main()
