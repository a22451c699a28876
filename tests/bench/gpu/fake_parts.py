"""Parts of which some fail in every way there is."""

import os
import time

from bench.gpu.parts import Part, main


def broken(suite):
    suite.check("before the error", 0.0, 1.0)
    raise RuntimeError("a bug")


PARTS = {
    "good": Part(lambda suite: suite.check("bits", 0.0, 0.0), 60),
    "hanging": Part(lambda suite: time.sleep(600), 0),
    "killed": Part(lambda suite: os.abort(), 60),
    "broken": Part(broken, 60),
    "wrong": Part(lambda suite: suite.check("labels", 0.5, 0.1), 60),
}

if __name__ == "__main__":
    raise SystemExit(main(__spec__, __doc__, PARTS, minutes=10))
