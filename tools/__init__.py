"""Programs for people who change this project; users need none of them."""
