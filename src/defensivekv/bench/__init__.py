"""How fast it is and what it takes, beside what else there is: `defensivekv bench`.

`plan` says what is measured and `runner` measures it, cell by cell, into a folder; `rivals` are what is measured side
by side, some of them in processes of their own (`workers`); `measures` are the kinds of cells; `report` tells what
they say.
"""
