"""Sealed pages: encrypted and authenticated copies in ordinary memory, as ENCLS[EWB] writes and ENCLS[ELDU] loads them.

AES-GCM with a key of 128 bits, as the processor. The nonce is the version of the page, from a counter of the device, so that
no nonce is used twice under the key, for whichever page. The versions are the model's version array; tag and ciphertext lie
in ordinary memory, where anybody may change them. Enclave, offset and page type are authenticated along.
"""

from __future__ import annotations

import os
import struct
from typing import Any, Final

from prefault.drivers.enclave.kept_tables import TAG, KeptTables
from prefault.sizes import PAGE_SIZE

POISONED: Final = (1 << 64) - 1
"""In place of a version: the sealed page failed its authentication."""

_KEY = 0  # words of the header: the key, whether there is one, the next version
_HAS_KEY = 2
_NEXT_VERSION = 3
_KEY_BYTES = 16
_NONCE = struct.Struct("<QI")
_BOUND = struct.Struct("<QQQ")


class SealError(ValueError):
    """A sealed page is not what was sealed last: it was changed, exchanged or replayed (SGX_MAC_COMPARE_FAIL).

    Attributes:
        page: number in the device.
    """

    def __init__(self, page: int) -> None:
        super().__init__(f"the sealed copy of page {page} fails its authentication: it was changed, exchanged or replayed")
        self.page = page


class PageSealer:
    """Seals and unseals the pages of a device; the key and the next version are in its kept memory.

    Raises:
        ImportError: the package ``cryptography`` is not installed.
    """

    def __init__(self, tables: KeptTables) -> None:
        aesgcm, self._invalid = load_cipher()
        self._tables = tables
        self._header = header = tables.header
        if not header[_HAS_KEY]:
            header[_KEY], header[_KEY + 1] = struct.unpack("<QQ", os.urandom(_KEY_BYTES))
            header[_NEXT_VERSION] = 1
            header[_HAS_KEY] = 1
        self._cipher = aesgcm(struct.pack("<QQ", header[_KEY], header[_KEY + 1]))

    def seal(self, run: range, content: memoryview, enclave: int, offset: int, page_type: int) -> None:
        """Seal adjacent pages of one type (EWB).

        Args:
            run: the pages, in the device.
            content: of all of them.
            enclave: number of the enclave.
            offset: of the first page, in pages from the start of the enclave.
            page_type: the type.
        """
        tables, encrypt, nonce, bound = self._tables, self._cipher.encrypt, _NONCE.pack, _BOUND.pack
        sealed, tags, versions = tables.sealed, tables.tags, tables.versions
        version = self._header[_NEXT_VERSION]
        # Taken before they are used: a server that is killed in between loses versions, and uses none a second time.
        self._header[_NEXT_VERSION] = version + len(run)
        start = 0
        for page in run:
            data = encrypt(nonce(version, 0), content[start : start + PAGE_SIZE], bound(enclave, offset, page_type))
            at = page * PAGE_SIZE
            sealed[at : at + PAGE_SIZE] = data[:PAGE_SIZE]
            tags[page * TAG : page * TAG + TAG] = data[PAGE_SIZE:]
            versions[page] = version
            version += 1
            offset += 1
            start += PAGE_SIZE

    def is_sealed(self, page: int) -> bool:
        """Return whether there is a sealed copy of a page, be it a good one or not."""
        return self._tables.versions[page] != 0

    def unseal(self, page: int, frame: memoryview, enclave: int, offset: int, page_type: int) -> None:
        """Load a sealed page into a frame (ELDU).

        Raises:
            SealError: the copy is not the last one that was sealed for this page; the page is poisoned from now on. The
                frame stays as it was.
        """
        tables = self._tables
        version = tables.versions[page]
        if version == POISONED:
            raise SealError(page)
        at = page * PAGE_SIZE
        # Copied once, so that nobody changes it between the check and the use.
        data = b"".join((tables.sealed[at : at + PAGE_SIZE], tables.tags[page * TAG : page * TAG + TAG]))
        try:
            frame[:] = self._cipher.decrypt(_NONCE.pack(version, 0), data, _BOUND.pack(enclave, offset, page_type))
        except self._invalid:
            tables.versions[page] = POISONED
            raise SealError(page) from None


def load_cipher() -> tuple[Any, type[Exception]]:
    """Return the class AESGCM of the package ``cryptography``, and its exception for a wrong tag.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise ImportError(
            f"an enclave page cache needs cryptography, which is not installed: pip install 'prefault[enclave]' ({error})",
            name="cryptography",
        ) from None
    return AESGCM, InvalidTag
