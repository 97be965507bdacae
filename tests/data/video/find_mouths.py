"""Prints where OpenCV's cascade finds mouths in videos: run by test_cascade, with an OpenCV that has cascades."""

from __future__ import annotations

import json
import sys

import av

from avppc.data.video import faces as mouth


def main(paths: list[str]) -> None:
    finder = mouth.make_finder("cascade")
    found = {}
    for path in paths:
        with av.open(path) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][::7]
        faces = [finder.find(frame) for frame in frames]
        found[path] = [None if face is None else list(map(float, face.mouth)) for face in faces]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
