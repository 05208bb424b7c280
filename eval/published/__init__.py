"""Published evaluation sets: what each is (data/NAME.json), and reading them as they are published (layouts/)."""
