"""What H.264 says of its reference pictures in clear: headers only, no entropy decoding (ITU-T H.264, 7.3.1 and
7.3.2.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SLICE, IDR_SLICE, SEQUENCE = 1, 5, 7  # nal_unit_type of what is read here
CHROMA_PROFILES = {44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244}  # their SPS has a chroma format
INTRA_SLICES = (2, 4)  # slice_type modulo 5: I and SI
LARGEST_DPB = 16  # frames, the format's limit
HEADER_BYTES = 512  # of a NAL unit; a sequence header is shorter
SLICE_BYTES = 16  # of a slice: its first two codes are shorter
LONGEST_CODE = 32  # leading zeros of an Exp-Golomb code


@dataclass(frozen=True)
class SequenceHeader:
    """max_references: frames that may be kept for reference at once; interlaced: fields or MBAFF may occur."""

    max_references: int
    interlaced: bool


class Headers:
    """Reads NAL units of one stream, in either form: length-prefixed (mp4, matroska) or with start codes.

    extradata: the stream's, from which the form and the first sequence header are taken. sequence: the last header
    seen, or None while there was none that could be read.
    """

    def __init__(self, extradata: bytes | None) -> None:
        self.sequence: SequenceHeader | None = None
        data = bytes(extradata or b"")
        self._length_bytes = (data[4] & 3) + 1 if len(data) > 6 and data[0] == 1 else 0
        if self._length_bytes:
            count, at = data[5] & 31, 6
            for _ in range(count):
                size = int.from_bytes(data[at : at + 2], "big")
                self._note(data[at + 2 : at + 2 + size])
                at += 2 + size
        else:
            for unit in _with_start_codes(data):
                self._note(unit)

    def is_reference(self, packet: bytes) -> bool:
        """Whether the packet's picture may be referred to (nal_ref_idc); True where that cannot be read."""
        for unit in self._units(packet):
            kind = unit[0] & 31
            if kind == SEQUENCE:
                self._note(unit)
            elif kind in (SLICE, IDR_SLICE):
                return bool(unit[0] & 0x60)
        return True

    def is_intra(self, packet: bytes) -> bool:
        """Whether the packet's picture refers to no other, so that a decoder can begin there (slice_type, 7.4.3); a key
        frame of periodic intra refresh does not say so. True where that cannot be read."""
        for unit in self._units(packet):
            if unit[0] & 31 in (SLICE, IDR_SLICE):
                bits = _Bits(unit[1:SLICE_BYTES].replace(b"\0\0\3", b"\0\0"))
                try:
                    bits.code()
                    return bits.code() % 5 in INTRA_SLICES
                except ValueError:
                    break
        return True

    def _units(self, packet: bytes) -> Iterator[bytes]:
        if not self._length_bytes:
            yield from _with_start_codes(packet)
            return
        at = 0
        while at + self._length_bytes < len(packet):
            size = int.from_bytes(packet[at : at + self._length_bytes], "big")
            at += self._length_bytes
            if size == 0 or at + size > len(packet):
                return
            yield packet[at : at + min(size, HEADER_BYTES)]
            at += size

    def _note(self, unit: bytes) -> None:
        if len(unit) > 4 and unit[0] & 31 == SEQUENCE:
            try:
                self.sequence = parse_sequence(unit[1:])
            except ValueError:
                pass  # damaged: the decoder complains of it, if it matters


def parse_sequence(payload: bytes) -> SequenceHeader:
    """A sequence parameter set without its NAL header byte. Raises ValueError where it is cut or impossible."""
    bits = _Bits(payload.replace(b"\0\0\3", b"\0\0"))
    profile = bits.take(8)
    bits.take(16)
    bits.code()
    if profile in CHROMA_PROFILES:
        chroma = bits.code()
        bits.take(1 if chroma == 3 else 0)
        bits.code()
        bits.code()
        bits.take(1)
        if bits.take(1):
            for n in range(12 if chroma == 3 else 8):
                if bits.take(1):
                    _skip_scaling_list(bits, 16 if n < 6 else 64)
    bits.code()
    order_type = bits.code()
    if order_type == 0:
        bits.code()
    elif order_type == 1:
        bits.take(1)
        bits.code()
        bits.code()
        for _ in range(min(bits.code(), 256)):
            bits.code()
    references = bits.code()
    if references > LARGEST_DPB:
        raise ValueError(f"max_num_ref_frames is {references}, over {LARGEST_DPB}")
    bits.take(1)
    bits.code()
    bits.code()
    return SequenceHeader(references, interlaced=not bits.take(1))


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            code = bits.code()
            following = (last + (code + 1 if code % 2 else -code) // 2 + 256) % 256
        last = following or last


class _Bits:
    """Most significant bit first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, count: int) -> int:
        """Unsigned number of `count` bits."""
        self._left -= count
        if self._left < 0:
            raise ValueError("the sequence header is cut")
        return self._value >> self._left & (1 << count) - 1

    def code(self) -> int:
        """Unsigned Exp-Golomb code (9.1)."""
        zeros = 0
        while not self.take(1):
            zeros += 1
            if zeros > LONGEST_CODE:
                raise ValueError("no Exp-Golomb code")
        return (1 << zeros) - 1 + self.take(zeros)


def _with_start_codes(data: bytes) -> Iterator[bytes]:
    """The beginnings of NAL units after 00 00 01."""
    at = data.find(b"\0\0\1")
    while at >= 0:
        begin = at + 3
        at = data.find(b"\0\0\1", begin)
        unit = data[begin : min(begin + HEADER_BYTES, len(data) if at < 0 else at)]
        if unit:
            yield unit
