"""The README keeps its promises about commands, files and options."""

import re

from conftest import ROOT, run_cli

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_test_command_is_the_one_ci_runs():
    assert (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1] in README


def test_every_file_of_its_tree_exists_and_every_module_is_in_it():
    tree = re.search(r"```text\n(cfg\.py.*?)```", README, re.S)[1]
    listed = set(re.findall(r"^(\S+(?:\.py|/))", tree, re.M))
    folders = {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")}
    assert listed == {path.name for path in ROOT.glob("*.py")} | folders | {
        "docs/",
        "examples/",
        "recipes/",
        "weights/",
        "tests/",
    }


def test_pictures_it_shows_are_there():
    paths = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert paths
    for path in paths:
        assert (ROOT / path).is_file(), path


def test_the_page_of_options_is_current():
    done = run_cli("cfg.py")
    assert done.returncode == 0
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == done.stdout


def test_links_within_the_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "EXPERIMENTS.md", *(ROOT / "docs").rglob("*.md")]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) > 20
    for page, link in links:
        assert (page.parent / link).exists(), (page.name, link)
