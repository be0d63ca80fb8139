"""Cut Pang and Lee's sentence polarity (NLTK's sentence_polarity.zip) into pool, dev and test rows:

python prepare.py sentence_polarity.zip polarity
"""

import json
import random
import sys
import zipfile
from pathlib import Path

archive, out = zipfile.ZipFile(sys.argv[1]), Path(sys.argv[2])
rows = {}
for label, name in (("positive", "rt-polarity.pos"), ("negative", "rt-polarity.neg")):
    member = next(path for path in archive.namelist() if path.endswith(name))
    for line in archive.read(member).decode("latin-1").splitlines():
        if text := " ".join(line.split()):
            rows.setdefault(text, label)  # a sentence that stands twice is in one part alone
shuffled = sorted(rows.items())
random.Random(0).shuffle(shuffled)
out.mkdir(parents=True, exist_ok=True)
for part, start, stop in (("test", 0, 2000), ("dev", 2000, 2500), ("pool", 2500, None)):
    with (out / f"{part}.jsonl").open("w", encoding="utf-8") as file:
        for text, label in shuffled[start:stop]:
            file.write(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")
