"""Step 1 on any data set. See python generate_cams.py --benchmark shapes|FILE.yaml --help"""
from pipeline.cams_cli import main
from pipeline.run import command

if __name__ == "__main__":
    command(main)
