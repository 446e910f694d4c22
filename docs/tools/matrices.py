"""Tables and ranking plots of finished matrices, put into docs/compare.md and docs/pictures:

    PYTHONPATH=. python docs/tools/matrices.py runs/compare-*        # folders of `enhancer compare`

Each folder's part stands between `<!-- matrix NAME -->` and `<!-- end -->`, which the page must have; what is written by
hand around them stays. Unfinished matrices are refused: a table with holes is no result.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from enhancer.experiment.page import all_charts
from enhancer.experiment.results import make_results
from enhancer.experiment.tables import all_tables, markdown_table
from enhancer.runfolder import read_json

DOCS = Path(__file__).resolve().parents[1]
PAGE = DOCS / "compare.md"
SHOWN = ("accuracy", "cost")  # how the titles of the tables begin that the page has; the others are in the report
WIDTH = 560  # of a picture on the page, in pixels
LOCAL = re.compile(r"\s(-q|--quiet|(output|pool)=\S+)")  # of a command: where its files were, and what it said
# the report's colours by the number of a series, as a picture of its own has no page that would give them
STYLE = """<style>
text { fill:#767c84; font:11.5px system-ui,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
.grid { stroke:#8885; } .reference { stroke:#767c84; stroke-width:1.2; stroke-dasharray:4 3; }
.bar { stroke-width:2; } .dot { opacity:.75; }
.bar.s0 { stroke:#767c84; } .bar.s2 { stroke:#c8500a; } .bar.s5 { stroke:#00936a; }
.mark.s0, .dot.s0 { fill:#767c84; } .mark.s2, .dot.s2 { fill:#c8500a; } .mark.s5, .dot.s5 { fill:#00936a; }
</style>"""


def main(folders: list[Path]) -> None:
    for folder in folders:
        results, record = make_results(folder), read_json(folder / "run.json", {})
        if results["missing"] or record.get("status") != "finished":
            sys.exit(f"{folder} is not finished ({record.get('status')}); run its command again first.")
        pictures = [_picture(results["name"], number, of) for number, of in enumerate(all_charts(results)[:2]) if of]
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(replaced(page, results["name"], _part(results, record, pictures)), encoding="utf-8")
        print(f"{PAGE}: {results['name']}")


def replaced(page: str, name: str, part: str) -> str:
    """The page with `part` between the matrix's marks; SystemExit where it has none."""
    marks = re.compile(rf"(<!-- matrix {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not marks.search(page):
        sys.exit(f"{PAGE} has no line `<!-- matrix {name} -->` with `<!-- end -->` below it; write them first.")
    return marks.sub(lambda match: f"{match[1]}\n{part}\n\n{match[2]}", page)


def _picture(name: str, number: int, chart: tuple[str, Any]) -> tuple[str, str]:
    """Writes a chart as an SVG of its own; its caption and its file below docs/."""
    caption, drawn = chart
    file = f"pictures/{name}{'-reference' if number else ''}.svg"
    svg = str(drawn).replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" ', 1).replace(">", f">{STYLE}", 1)
    (DOCS / file).write_text(svg + "\n", encoding="utf-8")
    return caption, file


def _part(results: dict[str, Any], record: dict[str, Any], pictures: list[tuple[str, str]]) -> str:
    minutes = sum(record.get("seconds", {}).values()) / 60
    said = [f"`{LOCAL.sub('', record['command'])}` on {record['machine']}, {record['finished'][:10]}: {minutes:.0f} minutes."]
    said += [f"**{results['headline']}**"]
    said += [f"![{caption}]({file})" for caption, file in pictures]
    priced = all(row["cost"].get("seconds") is not None for row in results["rows"] if row["source"])
    for title, heads, rows in all_tables(results):
        if title.startswith(SHOWN) and (priced or title != "cost"):  # not where the pool no longer knows what priors cost
            said += [f"*{title[0].upper()}{title[1:]}*", markdown_table(heads, rows)]
    return "\n\n".join([*said, "\n".join(f"- {sentence}" for sentence in results["sentences"])])


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
