"""AES-256 key schedules (FIPS 197) and states of HMAC-SHA256 (FIPS 180-4) in plain Python, to know what a
cipher or a MAC may leave in memory.

An AES key leaks as well by its round keys as by itself: from any two of them in a row the key can be
computed. Libraries keep them as bytes or as 32-bit words of the machine (so with the four bytes of
each word turned round), and for decryption with InvMixColumns applied to rounds 1 to 13.
Bit-sliced and vector-permuted software schedules, used on CPUs without AES instructions, are not among these.
"""

from __future__ import annotations

import struct

ROUNDS = 14


def _times(a: int, b: int) -> int:
    """Multiply in GF(2^8) modulo x^8 + x^4 + x^3 + x + 1 (FIPS 197, 4.2)."""
    product = 0
    while b:
        product ^= a * (b & 1)
        a = (a << 1) ^ (0x11B * (a >> 7))
        b >>= 1
    return product


def _sbox() -> bytes:
    """FIPS 197, 5.1.1: the inverse, then an affine map."""
    inverse = [next((b for b in range(256) if _times(a, b) == 1), 0) for a in range(256)]
    rotated = ([((i << n | i >> (8 - n)) & 255) for n in range(5)] for i in inverse)
    return bytes(a ^ b ^ c ^ d ^ e ^ 0x63 for a, b, c, d, e in rotated)


SBOX = _sbox()
_TIMES = {n: bytes(_times(n, byte) for byte in range(256)) for n in (9, 11, 13, 14)}


def expand(key: bytes) -> bytes:
    """The 15 round keys of a 32-byte key, 240 bytes; the first 32 are the key (FIPS 197, 5.2)."""
    words = [key[i : i + 4] for i in range(0, 32, 4)]
    rcon = 1
    for i in range(8, 4 * (ROUNDS + 1)):
        word = words[-1]
        if i % 8 == 0:
            word = (word[1:] + word[:1]).translate(SBOX)
            word = bytes((word[0] ^ rcon,)) + word[1:]
            rcon = _times(rcon, 2)
        elif i % 8 == 4:
            word = word.translate(SBOX)
        words.append(bytes(a ^ b for a, b in zip(word, words[-8])))
    return b"".join(words)


def encrypt_block(schedule: bytes, block: bytes) -> bytes:
    """One block (FIPS 197, 5.1)."""
    state = _xor(block, schedule[:16])
    for number in range(1, ROUNDS + 1):
        state = bytes(SBOX[state[4 * ((i // 4 + i % 4) % 4) + i % 4]] for i in range(16))  # ShiftRows
        if number < ROUNDS:
            state = b"".join(_mixed(state[i : i + 4]) for i in range(0, 16, 4))
        state = _xor(state, schedule[16 * number : 16 * number + 16])
    return state


def _xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b))


def _mixed(column: bytes) -> bytes:
    turned = [column[n:] + column[:n] for n in range(4)]
    return bytes(_times(a, 2) ^ _times(b, 3) ^ c ^ d for a, b, c, d in zip(*turned))


def ghash_keys(key: bytes) -> dict[str, bytes]:
    """The hash key H of GCM (SP 800-38D, 6.4) and its double, as libraries keep them, in four orders of their
    bytes: code works on halves, or on numbers. Who has H and one message forges others under the key."""
    plain = encrypt_block(expand(key), bytes(16))
    number = int.from_bytes(plain, "big")
    double = (number << 1) & ((1 << 128) - 1) ^ (number >> 127) * (0xC2 << 120 | 1)  # as OpenSSL's gcm_init
    found = {}
    for name, value in (("H", plain), ("2H", double.to_bytes(16, "big"))):
        turned = value[::-1]
        found[name] = value
        found[f"{name}, bytes reversed"] = turned
        found[f"{name}, halves swapped"] = value[8:] + value[:8]
        found[f"{name}, bytes reversed, halves swapped"] = turned[8:] + turned[:8]
    return found


def inverse_mix_columns(block: bytes) -> bytes:
    """FIPS 197, 5.3.3, on any number of 4-byte columns."""
    nine, eleven, thirteen, fourteen = (_TIMES[n] for n in (9, 11, 13, 14))
    out = bytearray()
    for i in range(0, len(block), 4):
        a, b, c, d = block[i : i + 4]
        out += bytes(
            (
                fourteen[a] ^ eleven[b] ^ thirteen[c] ^ nine[d],
                nine[a] ^ fourteen[b] ^ eleven[c] ^ thirteen[d],
                thirteen[a] ^ nine[b] ^ fourteen[c] ^ eleven[d],
                eleven[a] ^ thirteen[b] ^ nine[c] ^ fourteen[d],
            )
        )
    return bytes(out)


def decrypt_round_keys(schedule: bytes) -> bytes:
    """Rounds 13 to 1 as the equivalent inverse cipher wants them (FIPS 197, 5.3.5), 208 bytes."""
    return b"".join(inverse_mix_columns(schedule[16 * n : 16 * n + 16]) for n in range(ROUNDS - 1, 0, -1))


def swapped(data: bytes) -> bytes:
    """Each 32-bit word with its bytes in the other order."""
    count = len(data) // 4
    return struct.pack(f"<{count}I", *struct.unpack(f">{count}I", data))


# ---- HMAC-SHA256 -----------------------------------------------------------------------------------------

_PRIMES = [n for n in range(2, 312) if all(n % d for d in range(2, n))]
_SQUARE = [int(prime**0.5 % 1 * 2**32) for prime in _PRIMES[:8]]  # FIPS 180-4, 5.3.3
_CUBE = [int(prime ** (1 / 3) % 1 * 2**32) for prime in _PRIMES]  # 4.2.2


def _turned(word: int, *counts: int) -> int:
    """Rotated right by each count, and added without carry."""
    found = 0
    for count in counts:
        found ^= word >> count | word << (32 - count)
    return found & 0xFFFFFFFF


def sha256_state(block: bytes) -> tuple[int, ...]:
    """After the first block of 64 bytes (6.2.2): whoever has that of a key's pad signs as with the key."""
    w = list(struct.unpack(">16L", block))
    for i in range(16, 64):
        low = _turned(w[i - 15], 7, 18) ^ w[i - 15] >> 3
        high = _turned(w[i - 2], 17, 19) ^ w[i - 2] >> 10
        w.append((w[i - 16] + low + w[i - 7] + high) & 0xFFFFFFFF)
    a, b, c, d, e, f, g, h = _SQUARE
    for i in range(64):
        one = h + _turned(e, 6, 11, 25) + (e & f ^ ~e & g) + _CUBE[i] + w[i]
        two = _turned(a, 2, 13, 22) + (a & b ^ a & c ^ b & c)
        a, b, c, d, e, f, g, h = (one + two) & 0xFFFFFFFF, a, b, c, (d + one) & 0xFFFFFFFF, e, f, g
    return tuple((x + y) & 0xFFFFFFFF for x, y in zip(_SQUARE, (a, b, c, d, e, f, g, h)))


def hmac_states(key: bytes) -> dict[str, bytes]:
    """What a context keeps between two messages, as words of the machine."""
    pads = {"inner": bytes(byte ^ 0x36 for byte in key), "outer": bytes(byte ^ 0x5C for byte in key)}
    fill = {"inner": b"\x36", "outer": b"\x5c"}
    return {n: struct.pack("=8L", *sha256_state(pad + fill[n] * (64 - len(pad)))) for n, pad in pads.items()}
