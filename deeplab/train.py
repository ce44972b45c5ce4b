"""Step 3, train a network on masks: python -m deeplab.train --help"""

from functools import partial

from deeplab.recipe import RECIPE
from pipeline.run import command
from training import train

main = partial(train.main, RECIPE)

if __name__ == "__main__":
    command(main, train.AGAIN)
