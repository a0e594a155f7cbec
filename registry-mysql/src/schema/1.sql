CREATE TABLE IF NOT EXISTS {prefix}schema (
  version INT UNSIGNED NOT NULL,
  PRIMARY KEY (version)
) ENGINE = InnoDB;

-- One row per namespace: the lock on it orders all writes, and is held to the commit.
CREATE TABLE IF NOT EXISTS {prefix}namespaces (
  id INT UNSIGNED NOT NULL AUTO_INCREMENT,
  name VARBINARY(1024) NOT NULL,
  revision BIGINT UNSIGNED NOT NULL,
  compacted BIGINT UNSIGNED NOT NULL,
  PRIMARY KEY (id),
  UNIQUE KEY by_name (name)
) ENGINE = InnoDB ROW_FORMAT = DYNAMIC;

-- What there is now. Names are bytes: no collation has a say.
CREATE TABLE IF NOT EXISTS {prefix}entries (
  namespace INT UNSIGNED NOT NULL,
  name VARBINARY(1152) NOT NULL,
  value MEDIUMBLOB NOT NULL,
  create_revision BIGINT UNSIGNED NOT NULL,
  mod_revision BIGINT UNSIGNED NOT NULL,
  session BIGINT UNSIGNED NULL,
  PRIMARY KEY (namespace, name),
  KEY by_session (namespace, session)
) ENGINE = InnoDB ROW_FORMAT = DYNAMIC;

-- What changed: at least one row for every revision above `compacted`. Kind 0 put a key, 1 deleted it, 2 ended its
-- session; a delete holds the entry as it last was. The client and its sequence settle what became of a lost commit.
CREATE TABLE IF NOT EXISTS {prefix}changes (
  namespace INT UNSIGNED NOT NULL,
  revision BIGINT UNSIGNED NOT NULL,
  position INT UNSIGNED NOT NULL,
  name VARBINARY(1152) NOT NULL,
  kind TINYINT UNSIGNED NOT NULL,
  value MEDIUMBLOB NOT NULL,
  create_revision BIGINT UNSIGNED NOT NULL,
  mod_revision BIGINT UNSIGNED NOT NULL,
  session BIGINT UNSIGNED NULL,
  client BIGINT UNSIGNED NOT NULL,
  sequence BIGINT UNSIGNED NOT NULL,
  PRIMARY KEY (namespace, revision, position)
) ENGINE = InnoDB ROW_FORMAT = DYNAMIC;

-- Who is alive: `beat` moves with every keep-alive. `seen_at` is for people; nothing is decided by it.
CREATE TABLE IF NOT EXISTS {prefix}sessions (
  namespace INT UNSIGNED NOT NULL,
  id BIGINT UNSIGNED NOT NULL,
  ttl_ms BIGINT UNSIGNED NOT NULL,
  beat BIGINT UNSIGNED NOT NULL,
  seen_at DATETIME(3) NOT NULL,
  PRIMARY KEY (namespace, id)
) ENGINE = InnoDB;

INSERT IGNORE INTO {prefix}schema (version) VALUES (1);
