def plot(p, path):
    raise NotImplementedError
