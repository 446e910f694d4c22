"""A process that reads motion, and hangs or crashes over files of those names."""

import os
import signal
import time
from pathlib import Path

from enhancer.video.codec.guarded import answer
from enhancer.video.decoder import main


def badly(request):
    name = Path(request["path"]).name
    if name.startswith("hang"):
        time.sleep(600)
    elif name.startswith("segfault"):
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
    return answer(request)


main(badly)
