"""One JUnit file for all files of tests: a testsuite each."""

from pathlib import Path
from xml.etree import ElementTree

from records import MOST_TEXT, replace_file


def add_suite(path: Path, made: Path) -> None:
    """Adds the testsuites that pytest left in `made`, if it got so far, to those in `path`.

    A suite of the same tests takes the place of an earlier one. The file is replaced whole.
    """
    try:
        new = ElementTree.parse(made).getroot()
    except (OSError, ElementTree.ParseError):  # pytest did not get so far, or was ended meanwhile
        return
    suites = (
        ElementTree.parse(path).getroot() if path.exists() else ElementTree.Element("testsuites")
    )
    for suite in list(new):
        suite.set("name", _file_of(suite))
        for old in [other for other in suites if other.get("name") == suite.get("name")]:
            suites.remove(old)
        for text in suite.iter():
            if text.text and len(text.text) > MOST_TEXT:
                text.text = text.text[-MOST_TEXT:]
        suites.append(suite)
    replace_file(path, ElementTree.tostring(suites))


def _file_of(suite: ElementTree.Element) -> str:
    """tests.gpu.test_rows, as pytest names the module of a test."""
    case = suite.find("testcase")
    return case.get("classname", "pytest") if case is not None else "pytest"
