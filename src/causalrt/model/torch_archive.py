"""The checksums of a torch file (`.pt`, `.pth`), which is a zip archive with a member for each storage.

torch writes a CRC-32 for each member, but does not check it when it maps a file. (Legacy torch files and safetensors files
have no checksums.)
"""

import bisect
import logging
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from causalrt.control_groups import available_cpus
from causalrt.errors import CheckpointError

logger = logging.getLogger(__name__)

_LOCAL_HEADER = struct.Struct("<26xHH")
_PIECE_BYTES = 2**24
_MAX_THREADS = 4


class TorchArchive:
    """The members of a torch file, each checked at most once."""

    def __init__(self, path: Path) -> None:
        """Read the archive's directory, and check those members that hold no storage, above all the pickle.

        Raises:
            CheckpointError: the file is not an archive as torch writes it, or a checksum is wrong.
        """
        self._path = path
        self._checked: set[int] = set()
        try:
            self._archive = zipfile.ZipFile(path)
            self._members = sorted((self._data_offset(info), info) for info in self._archive.infolist())
        except Exception as error:  # a damaged or malicious table can make the parser raise anything
            raise CheckpointError(f"{path} is damaged: its table of members cannot be read: {error}") from None
        self._has_checksums = any(info.CRC for _, info in self._members)
        if not self._has_checksums:
            logger.warning("%s was saved without checksums: a damaged file would not be noticed", path)
        for offset, info in self._members:
            if "/data/" not in info.filename:
                self._check(offset, info)

    def check_at(self, offset: int) -> None:
        """Check the member that contains the byte at an offset of the file.

        Raises:
            CheckpointError: its contents have changed since it was written, or no member is there.
        """
        index = bisect.bisect_right(self._members, offset, key=lambda member: member[0]) - 1
        self._check(*self._members[max(index, 0)])

    def check_all(self) -> None:
        """Check every member, several in parallel.

        Raises:
            CheckpointError: the contents of a member have changed since it was written.
        """
        with ThreadPoolExecutor(min(_MAX_THREADS, available_cpus())) as pool:
            list(pool.map(lambda member: self._check(*member), self._members))

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        assert self._archive.fp is not None
        self._archive.fp.seek(info.header_offset)
        name_bytes: int
        extra_bytes: int
        name_bytes, extra_bytes = _LOCAL_HEADER.unpack(self._archive.fp.read(_LOCAL_HEADER.size))
        return info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes

    def _check(self, offset: int, info: zipfile.ZipInfo) -> None:
        if offset in self._checked or not self._has_checksums:
            return
        try:
            if info.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile("it is compressed")
            with self._archive.open(info) as member:
                while member.read(_PIECE_BYTES):
                    pass
        except Exception as error:  # for the same reason as in `__init__`
            raise CheckpointError(
                f"{self._path} is damaged: {info.filename} in it is not what was written ({error}); download or copy it again"
            ) from None
        self._checked.add(offset)
