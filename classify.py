"""Step 0: image-level labels without annotation. See python classify.py --dataset NAME --help"""

from pipeline.run import command
from tagclip.classify import main

if __name__ == "__main__":
    command(main)
