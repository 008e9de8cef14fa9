"""Check the README and docs/: length, links, and the scripts, variables and flags they name.

    python docs/check_docs.py

Prints a line per fault and fails if there is any. It asks every script for its flags, which takes
a minute or more.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
README = REPO / "README.md"
PAGES = [README, REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md", *sorted(REPO.glob("docs/*.md"))]
README_WORDS, SENTENCE_WORDS, COLUMNS = 1300, 30, 100

CODE = re.compile(r"```.*?```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SCRIPT = re.compile(r"(?<!\w)(?:py_scripts|ssh_scripts|benchmarks|docs|fig)/(\w+)\.(?:py|sh)\b")
COMMAND = re.compile(
    rf"^((?:\w+=\S* +)*)(?:bash|python|mpiexec|sbatch)\b.*?({SCRIPT.pattern})(.*)$"
)
FLAG = re.compile(r"(?<![\w-])--[a-z]\w*")
VARIABLE = re.compile(r"\b[A-Z][A-Z0-9_]+\b")
BLOCK_START = re.compile(r"\s*(#+ |[-*] |\d+\. |!\[)")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\s·\s")
# Launchers that pass flags on to another launcher or script than the one of their name.
PASS_ON = {
    "multimodal_train_hosts": "py_scripts/multimodal_train.py",
    "multimodal_train_slurm": "py_scripts/multimodal_train.py",
    "benchmark": "benchmarks/run.py",
}
# Flags of pip, docker, sbatch and mpiexec, up to a hyphen
NOT_OURS = {"--no", "--shm", "--ipc", "--nodes", "--allow"}


def sentences(text: str) -> list[str]:
    """The sentences outside code blocks; a list item, a heading and a table cell each end one."""
    blocks = [""]
    for line in CODE.sub("\n\n", text).splitlines():
        if line.startswith("|"):
            blocks += [*line.strip("|").split("|"), ""]
        elif not line.strip() or BLOCK_START.match(line):
            blocks.append(line)
        else:
            blocks[-1] += " " + line.strip()
    return [sentence for block in blocks for sentence in SENTENCE_END.split(block.strip())]


def anchors(page: Path) -> set[str]:
    """The fragments that the headings of a page can be linked by."""
    titles = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def is_broken(link: str, page: Path) -> bool:
    path, _, fragment = link.partition("#")
    if "://" in path:
        return False
    target = (page.parent / path).resolve()
    if not path:
        target = page
    return not target.exists() or bool(fragment and fragment not in anchors(target))


@cache
def help_of(script: str) -> subprocess.CompletedProcess[str]:
    """What a Python script prints for --help."""
    command = [sys.executable, str(REPO / script), "--help"]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def flags_of(script: str) -> set[str]:
    """The flags that a Python script accepts, or a launcher passes on."""
    path = REPO / script
    if path.suffix == ".sh":
        target = PASS_ON.get(
            path.stem, f"py_scripts/{path.stem.replace('multimodal_eval', 'eval')}.py"
        )
        own = set(FLAG.findall(path.read_text()))
        return own | flags_of(target) if (REPO / target).exists() else own
    return set(FLAG.findall(help_of(script).stdout))


def scripts_with_flags() -> list[str]:
    own = sorted(REPO.glob("py_scripts/*.py"))
    scripts = [str(path.relative_to(REPO)) for path in own]
    return [*scripts, "benchmarks/run.py", "benchmarks/learn_toy.py"]


def all_flags() -> set[str]:
    return set().union(*map(flags_of, scripts_with_flags()))


def long_lines(prose: str) -> list[str]:
    """The lines that should be wrapped: tables and images cannot be."""
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "!["))]
    return [f"longer than {COLUMNS}: {line}" for line in lines if len(line) > COLUMNS]


def wrong_command(line: str) -> list[str]:
    """The variables and flags of a command that its script does not know."""
    command = COMMAND.match(line.split(" #")[0])
    if not command:
        return []
    variables, script, _, rest = command.groups()
    sources = [REPO / script, REPO / "ssh_scripts/multimodal_train.sh", REPO / "ssh_scripts/env.sh"]
    known = {name for path in sources for name in VARIABLE.findall(path.read_text())}
    wrong = set(re.findall(r"(\w+)=", variables)) - known
    flags = set(FLAG.findall(rest))
    if flags:
        wrong |= flags - flags_of(script)
    return [f"{script}: unknown {name}" for name in sorted(wrong)]


def faults(page: Path) -> list[str]:
    text = page.read_text()
    prose = CODE.sub("", text)
    counted = [(len(sentence.split()), sentence) for sentence in sentences(text)]
    found = [f"{words} words: {line}" for words, line in counted if words > SENTENCE_WORDS]
    if page == README and len(prose.split()) > README_WORDS:
        found.append(f"{len(prose.split())} words outside code blocks; at most {README_WORDS}")
    found += long_lines(prose)
    found += [f"broken link {link}" for link in LINK.findall(prose) if is_broken(link, page)]
    scripts = {match[0] for match in SCRIPT.finditer(text)}
    missing = sorted(script for script in scripts if not (REPO / script).exists())
    found += [f"no such file: {script}" for script in missing]
    found += [
        f"no script has {flag}"
        for flag in sorted(set(FLAG.findall(prose)) - all_flags() - NOT_OURS)
    ]
    lines = "\n".join(CODE.findall(text)).replace("\\\n", " ").splitlines()
    return found + [fault for line in lines for fault in wrong_command(line)]


if __name__ == "__main__":
    lines = [f"{page.relative_to(REPO)}: {fault}" for page in PAGES for fault in faults(page)]
    lines += [
        f"{script}: --help fails" for script in scripts_with_flags() if help_of(script).returncode
    ]
    sys.exit("\n".join(lines) if lines else 0)
