"""What LLM-Adapters published: record counts, sizes and SHA-256 of every file of Commonsense170K."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A published file: number of records, bytes, SHA-256 (hex) of the whole file."""

    records: int
    bytes: int
    sha256: str


CORPUS = "commonsense_170k.json"

_TABLE = """
commonsense_170k.json 170420 96529722 4651a3e707fbe28be03f486f96fcf57f8c38b2173f3e38812003108970793ac8
ARC-Challenge/test.json 1172 622510 4a89ce368ae01a71d268d9851686738b2a0a1d84271116bab49a1dd2b48ecad7
ARC-Challenge/train.json 1119 585556 a9debff28aafed86a08211dc3584a3b6cb38edca8c56bb34cd5002ed54aeebfb
ARC-Easy/test.json 2376 1157216 3f32a84716ca6d57d38728bf80cc8117aecd17445c2cf29a68b571b810eb82dc
ARC-Easy/train.json 2251 1092324 6a06cece3dec32f4fb1c1b0fc29dab14be7cf3053b417290dbc6cd845359f5ff
boolq/test.json 3270 899151 89df2397cbca81dc31adcc6f7f5b635821aa0565aafde46725b2b4bd39b4dfa9
boolq/train.json 9427 2599507 5ccbaceebaddc69765e1c4a363632196b81851d303696672165ab59ec4e48c83
hellaswag/test.json 10042 11099046 3ea7e99795e63a01f2f5e9ddbc4dca964d9ebb22f04201e64d1ac043be51ab61
hellaswag/train.json 39905 43072851 729aeafa3f600650a92e1c992a888528ac8a1ccd562408736eee66bed2183b1a
openbookqa/test.json 500 202545 8479930f7b8a26052c78250280b5465a4016ca7fc806af440d0f37e243f3099e
openbookqa/train.json 4957 1987446 a1e094eeea01f70c0baa880f37497b26700ae99b243927b9c529984de9b1fe90
piqa/test.json 1838 913157 3860d11b9b42e590b6b4bbc1643214d373ed0b0d4ac62fcc7bdceb8e044ad141
piqa/train.json 16113 8039815 d750ea06e70ce6af746f8315d2952a0a1488520794f934fd1f000286575e5702
social_i_qa/test.json 1954 843748 71543f41127451945379d106ffedaef502f1c8770dff6d2f543aca85e3080b1d
social_i_qa/train.json 33410 14379571 1ca995d6055a6be053bb54b4b4c7abe4cd0323940079071932c1f9129d589b17
winogrande/test.json 1267 497409 6946f5209e7114c65c6d04f8f644c5a061af20d730b1cfe158fff3dc44076fb9
winogrande/train.json 63238 24772666 154d4fc3ef6b065aff1b738150f3fbd8d497f8e32d7aaae114991a2ad912ae79
"""


def _parse(table: str) -> dict[str, Published]:
    rows = (line.split() for line in table.strip().splitlines())
    return {name: Published(int(records), int(size), sha256) for name, records, size, sha256 in rows}


PUBLISHED: dict[str, Published] = _parse(_TABLE)
