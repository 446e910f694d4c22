"""A decoder's process that hangs, crashes or fails over files of those names."""

import os
import signal
import sys
import time
from multiprocessing.connection import Connection

from enhancer.video.clip import read_clip
from enhancer.video.decoder import clips_by, serve


def read(video, sampling):
    name = video.name
    if name.startswith("hang"):
        time.sleep(600)
    elif name.startswith("segfault"):
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
    elif name.startswith("exit"):
        os._exit(7)
    return read_clip(video, sampling)


serve(Connection(int(sys.argv[1])), float(sys.argv[2]), clips_by(read))
