"""Will it fit, how far does it reach, and what to change: answered by running recipes on virtual cards.

model.py    what a recipe's model is, without its weights
machine.py  the GPU of this machine as a virtual card
ladder.py   from the fastest recipe to the leanest
answers.py  what a plan says
pair.py     one (recipe, card) pair planned
screen.py   an answer for a terminal
__main__.py the command
"""
