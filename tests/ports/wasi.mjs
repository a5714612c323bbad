// Runs a WASI program under node: node --no-warnings wasi.mjs PROGRAM [ARGUMENTS]; its exit code is the program's.
// SPDX-License-Identifier: MIT
import { readFileSync } from 'node:fs';
import { WASI } from 'node:wasi';

const wasi = new WASI({ version: 'preview1', args: process.argv.slice(2), returnOnExit: true });
const module = await WebAssembly.compile(readFileSync(process.argv[2]));
const instance = await WebAssembly.instantiate(module, wasi.getImportObject());
process.exitCode = wasi.start(instance);
