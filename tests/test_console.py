from io import StringIO

from rich.table import Table
from rich.text import Text

from defensivekv.console import make_console, print_whole


def test_text_is_printed_as_it_is_and_lines_stay_whole_in_a_pipe() -> None:
    console, said = make_console(), StringIO()
    console.file = said
    console.print(Text("a[:key:] [bold]b[/bold] \\ " + "word " * 60))
    assert said.getvalue() == "a[:key:] [bold]b[/bold] \\ " + "word " * 60 + "\n"


def test_a_tables_rows_stay_on_one_line() -> None:
    console, said = make_console(), StringIO()
    console.file = said
    table = Table()
    table.add_column("name", no_wrap=True)
    table.add_row("long " * 40)
    print_whole(table, console)
    assert "long " * 39 in said.getvalue()
