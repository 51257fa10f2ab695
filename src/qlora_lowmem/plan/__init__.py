"""Will it fit, how far does it reach, and what to change: answered by running recipes on virtual cards.

asked.py    what is asked: a recipe made ready for planning, on a card
ladder.py   from the fastest recipe to the leanest
answers.py  what a plan says
pair.py     one (recipe, card) pair planned
sweep.py    many pairs side by side
screen.py   an answer for a terminal
"""
