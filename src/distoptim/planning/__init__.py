"""What will pay on a given link, before anything is rented."""
