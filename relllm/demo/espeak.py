"""eSpeak NG as a process of its own: utterances in, samples out, bit-identical whatever was said before.

eSpeak NG's output depends on what the process has synthesised before, and initialising it again does not help. So the
process that `speak` starts, this same file run as a script, initialises it once and forks for every utterance: each
child starts from the same state, and seeds the noise in the voice, which eSpeak NG would seed by the clock. It
imports nothing big, because forking a process that runs torch's threads is slow and unsafe.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Utterance:
    """What eSpeak NG is asked for."""

    text: str  # English
    voice: str  # accent and variant, for example "en-us+f3"
    pitch: int  # 0 to 99; 50 is the voice's own
    pitch_range: int  # 0 (monotone) to 99
    rate: int  # words a minute, 80 to 450


def speak(utterances: Iterable[Utterance]) -> Iterator[tuple[bytes, int]]:
    """Synthesise utterances, read two ahead; yield the 16-bit little-endian mono samples of each and their rate in Hz.

    What eSpeak NG refuses, for example an unknown voice, is a `RuntimeError`.
    """
    if sys.platform == "win32":
        raise OSError("Speech synthesis forks a process for each utterance, which Windows cannot. Use Linux or macOS.")
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError("Speech synthesis needs eSpeak NG: `pip install relllm[demo]`.") from error
    command = [sys.executable, "-I", __file__, espeakng_loader.get_library_path(), espeakng_loader.get_data_path()]
    # A session of its own, so that Ctrl-C reaches only the caller; the end of its input then ends the process.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None and stdout is not None

    def receive(utterance: Utterance) -> tuple[bytes, int]:
        header = stdout.readline()
        if not header:
            raise RuntimeError(f"eSpeak NG's process ended with status {process.wait()} at {utterance}.")
        reply = json.loads(header)
        samples = stdout.read(reply["num_bytes"])
        if reply["error"] or not samples:
            raise RuntimeError(f"eSpeak NG could not say {utterance}: {reply['error'] or 'no samples came back'}.")
        return samples, reply["rate"]

    waiting: deque[Utterance] = deque()
    try:
        for utterance in utterances:
            stdin.write(json.dumps(asdict(utterance)).encode() + b"\n")
            stdin.flush()
            waiting.append(utterance)
            if len(waiting) > 2:  # the process speaks the next ones while the caller works on this one
                yield receive(waiting.popleft())
        while waiting:
            yield receive(waiting.popleft())
    finally:
        stdin.close()
        stdout.close()
        process.wait()


# --- the process -----------------------------------------------------------------------------------------------------

_SYNCHRONOUS, _POSITION_IS_CHARACTER, _TEXT_IS_UTF8 = 2, 1, 1  # constants of espeak-ng/speak_lib.h
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4


def _serve(library_path: str, data_path: str) -> None:
    """Read one utterance a line from standard input; write a JSON line and the samples to standard output."""
    library = ctypes.CDLL(library_path)
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data_path.encode(), 0)
    if rate <= 0:
        raise OSError(f"eSpeak NG does not start with the data in {data_path}. Install espeakng-loader again.")
    for line in sys.stdin.buffer:
        samples, error = _in_a_fork(library, Utterance(**json.loads(line)))
        header = {"num_bytes": len(samples), "rate": rate, "error": error}
        sys.stdout.buffer.write(json.dumps(header).encode() + b"\n" + samples)
        sys.stdout.buffer.flush()


def _in_a_fork(library: ctypes.CDLL, utterance: Utterance) -> tuple[bytes, str]:
    """Synthesise in a child of this process, whose own state stays as it was; return samples and error."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read_end)
            with open(write_end, "wb") as pipe:
                status = _synthesize(library, utterance, pipe.write)
        finally:
            os._exit(status)  # no clean-up of the parent's buffers in the child
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        samples = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    errors = {0: "", 2: "unknown voice"}
    return samples, errors.get(status, f"the child ended with status {status}")


def _synthesize(library: ctypes.CDLL, utterance: Utterance, write: Callable[[bytes], int]) -> int:
    callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)

    def on_samples(address: int | None, num_samples: int, _events: int) -> int:
        if address and num_samples > 0:
            write(ctypes.string_at(address, 2 * num_samples))
        return 0  # go on

    callback = callback_type(on_samples)  # kept in a variable: the library holds only the address
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(utterance.voice.encode()) != 0:
        return 2
    library.espeak_ng_SetRandSeed(ctypes.c_long(0))
    # Volume stays at 100: above, the library clips. Loudness is set on the samples.
    parameters = {_RATE: utterance.rate, _VOLUME: 100, _PITCH: utterance.pitch, _RANGE: utterance.pitch_range}
    for parameter, value in parameters.items():
        library.espeak_SetParameter(parameter, value, 0)
    text = utterance.text.encode() + b"\0"
    size = ctypes.c_size_t(len(text))
    status = library.espeak_Synth(text, size, 0, _POSITION_IS_CHARACTER, 0, _TEXT_IS_UTF8, None, None)
    library.espeak_Synchronize()
    return 0 if status == 0 else 3


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2])
