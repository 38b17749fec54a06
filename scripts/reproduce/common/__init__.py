"""What several claims share: records of runs, training of byte models, the curves that it leaves."""
